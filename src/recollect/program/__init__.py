"""The pure description of a training step: what everything else shares.

``Value`` and ``Op`` make a ``Program``; a ``Schedule`` is what really happens to it; a ``Plan`` is a schedule chosen
for one budget. ``simulate`` accounts for a schedule byte by byte, ``verify`` is the independent judge. No torch here.
"""

from recollect.program.errors import InfeasibleBudget, InvalidProgram, InvalidSchedule
from recollect.program.model import END, Op, Program, Value
from recollect.program.plan import Plan
from recollect.program.schedule import Schedule
from recollect.program.simulate import Timeline, simulate
from recollect.program.verify import Violation, verify

__all__ = [
    "END",
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
