"""Keep everything: plain training, without reruns, with the largest peak.

Every other plan is compared with it.
"""

from __future__ import annotations

from math import inf

from autoremat.program import Program, Schedule


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Return the program as it is, whatever the budget.

    Every value stays until its last reader has run.
    """
    return Schedule.plain(program)
