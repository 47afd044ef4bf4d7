"""Plan to execution: the eager tape."""

from recollect.run.instructions import Instructions, instructions_for
from recollect.run.session import Session
from recollect.run.stats import Stats
from recollect.run.tape import Tape

__all__ = ["Instructions", "Session", "Stats", "Tape", "instructions_for"]
