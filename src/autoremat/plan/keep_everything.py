"""Keep everything: plain training, no further runs, the largest peak. What every other plan is compared with."""

from __future__ import annotations

from autoremat.program import Program, Schedule


def keep_everything(program: Program, budget_bytes: int = 0) -> Schedule:
    """The program as it is, whatever the budget: every value stays until its last reader has run."""
    return Schedule.plain(program)
