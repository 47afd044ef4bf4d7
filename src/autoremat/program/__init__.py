"""The pure description of a training step: what everything else shares.

``Value`` and ``Op`` make a ``Program``; a ``Schedule`` is what really happens to it; a ``Plan`` is a schedule chosen
for one budget. ``simulate`` accounts for a schedule byte by byte, ``verify`` is the independent judge. No torch here.
"""

from autoremat.program.errors import InfeasibleBudget, InvalidProgram, InvalidSchedule
from autoremat.program.model import END, INSIDE, Op, Program, Value
from autoremat.program.plan import Plan
from autoremat.program.schedule import Schedule
from autoremat.program.simulator import Timeline, simulate
from autoremat.program.verifier import Violation, verify

__all__ = [
    "END",
    "INSIDE",
    "InfeasibleBudget",
    "InvalidProgram",
    "InvalidSchedule",
    "Op",
    "Plan",
    "Program",
    "Schedule",
    "Timeline",
    "Value",
    "Violation",
    "simulate",
    "verify",
]
