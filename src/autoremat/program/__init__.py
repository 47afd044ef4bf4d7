"""The pure description of a training step: what everything else shares.

``Value`` and ``Op`` make a ``Program``; a ``Schedule`` is what really happens to it; a ``Plan`` is a schedule chosen
for one budget. ``simulate`` accounts for a schedule byte by byte, ``verify`` is the independent judge. No torch here.
"""

from autoremat.program.abilities import Abilities
from autoremat.program.addresses import Addresses, place
from autoremat.program.decisions import Decision, beyond_decisions, decisions_of
from autoremat.program.errors import InfeasibleBudget, InvalidProgram, InvalidSchedule
from autoremat.program.link import Link
from autoremat.program.model import END, INSIDE, Op, Program, Value
from autoremat.program.once import Once
from autoremat.program.plan import Plan
from autoremat.program.repeats import Repeated, fold, unfold
from autoremat.program.schedule import Fetch, Free, Gone, Here, Offload, Run, Schedule, Send
from autoremat.program.simulator import Timeline, simulate
from autoremat.program.verifier import Violation, verify

__all__ = [
    "END",
    "INSIDE",
    "Abilities",
    "Addresses",
    "Decision",
    "Fetch",
    "Free",
    "Gone",
    "Here",
    "InfeasibleBudget",
    "InvalidProgram",
    "InvalidSchedule",
    "Link",
    "Offload",
    "Once",
    "Op",
    "Plan",
    "Program",
    "Repeated",
    "Run",
    "Schedule",
    "Send",
    "Timeline",
    "Value",
    "Violation",
    "beyond_decisions",
    "decisions_of",
    "fold",
    "place",
    "simulate",
    "unfold",
    "verify",
]
