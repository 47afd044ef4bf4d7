"""What the verbs of all engines refuse alike."""

from __future__ import annotations

from autoremat.planner import Wishes
from autoremat.program import Plan


def check_explained(step: object, budget: object, wishes: Wishes, *, has_more: bool) -> None:
    """Refuse wishes without a budget, and anything beside a plan.

    Args:
        step: what is to be explained.
        budget: as the user gave it; None: plain training.
        wishes: for a plan.
        has_more: whether arguments or options of a recording were given.

    Raises:
        TypeError: one of these.
    """
    if budget is None and wishes:
        raise TypeError("keep= and recompute= are wishes for a plan: give a budget with them")
    if isinstance(step, Plan) and (has_more or budget is not None):
        raise TypeError("a plan stands for itself: its program and its budget are in it")


def check_alone(has_more: bool, what: str) -> None:
    """Refuse anything beside a program.

    Args:
        has_more: whether anything was given.
        what: could have been given, and with what.

    Raises:
        TypeError: something was.
    """
    if has_more:
        raise TypeError(f"a program stands for itself: {what}")
