"""Greedy with full knowledge of the future: the yardstick printed beside every plan.

Starts from keeping everything. While the peak is above the budget, the value that is resident at the peak without being
used there, and whose return costs the fewest seconds per byte and run of absence, is dropped: the measure of DTR
(Kirisame et al. 2021), with the time until the next use, which DTR has to guess, known.
"""

from __future__ import annotations

from autoremat.planner.search.search import Candidate, Search


def greedy(search: Search, budget_bytes: int, *, rounds: int = 80, deadline: float = float("inf")) -> Candidate:
    """The greedy's candidate for the budget; its peak is above the budget where the greedy does not get there."""
    start = search.evaluate("greedy", (frozenset(),))
    return search.shave(start, budget_bytes, byte_time=True, rounds=rounds, deadline=deadline)
