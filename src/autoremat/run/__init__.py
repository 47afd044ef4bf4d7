"""Plan to execution: the eager tape."""

from autoremat.run.instructions import Instructions, instructions_for
from autoremat.run.session import Session
from autoremat.run.stats import Stats
from autoremat.run.tape import Tape

__all__ = ["Instructions", "Session", "Stats", "Tape", "instructions_for"]
