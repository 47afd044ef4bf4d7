"""Keep everything: plain training, no reruns, the largest peak. What every other plan is compared with."""

from __future__ import annotations

from math import inf

from autoremat.program import Program, Schedule


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """The program as it is, whatever the budget: every value stays until its last reader has run."""
    return Schedule.plain(program)
