"""The largest size that fits: a search over plans.

Any engine may record the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from autoremat.planner import parse_budget
from autoremat.planner.refusals import with_message
from autoremat.program import InfeasibleBudget, Plan
from autoremat.program.units import format_bytes


@dataclass(frozen=True)
class Try:
    """One size that was looked at.

    Attributes:
        n: the size.
        fits: whether there is a plan within the budget and the overhead allowed.
        peak_bytes: the peak of the plan; where no plan is within the budget, of the smallest schedule known.
        overhead: of the plan; infinite where no plan is within the budget.
    """

    n: int
    fits: bool
    peak_bytes: int
    overhead: float


@dataclass(frozen=True)
class MaxBatch:
    """The largest size that fits.

    Attributes:
        batch: the size; the next one, ``batch + 1``, does not fit or is beyond ``most``.
        plan: its plan.
        tries: every size that was looked at, in that order.
    """

    batch: int
    plan: Plan
    tries: tuple[Try, ...]


def largest(plan_of: Callable[[int], Plan], *, overhead: float, start: int, most: int) -> MaxBatch:
    """Find the largest size that has a plan. O(log n) plans.

    Args:
        plan_of: plans one size; raises ``InfeasibleBudget`` where no plan is within the budget.
        overhead: the largest overhead allowed.
        start: the size to begin with.
        most: the largest size of interest.

    Raises:
        InfeasibleBudget: not even ``n = 1`` fits.
        ValueError: everything that was looked at fits, and takes the same.
    """
    results: dict[int, Plan | InfeasibleBudget] = {}

    def fits(n: int) -> bool:
        try:
            results[n] = plan_of(n)
        except InfeasibleBudget as error:
            results[n] = error
        return _tried(n, results[n], overhead).fits

    best = _search(fits, start, most)
    plan = results.get(best)
    if not isinstance(plan, Plan):
        raise _nothing_fits(results[1], overhead)
    _refuse_constant(results, best, most)
    return MaxBatch(best, plan, tuple(_tried(n, result, overhead) for n, result in results.items()))


def _search(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Find the largest ``n`` up to ``most`` that fits, or 0.

    O(log n) tries by doubling, then halving; 0 when not even 1 fits.
    """
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _tried(n: int, result: Plan | InfeasibleBudget, overhead: float) -> Try:
    """Describe one size by what came of planning it."""
    if isinstance(result, InfeasibleBudget):
        return Try(n, False, result.floor_bytes, inf)
    return Try(n, result.overhead <= overhead, result.peak_bytes, result.overhead)


def _nothing_fits(result: Plan | InfeasibleBudget, overhead: float) -> InfeasibleBudget:
    """Make the error of what came of ``n = 1``."""
    if isinstance(result, InfeasibleBudget):
        return with_message(result, f"not even n = 1 fits: {result}")
    return InfeasibleBudget(
        f"not even n = 1 fits: within {format_bytes(result.budget_bytes)} it takes {result.overhead:+.1%} time (no "
        f"plan can be below {result.lower_bound:+.1%}), and overhead={overhead} allows {overhead:+.1%}; give a larger "
        "budget or allow more overhead",
        budget_bytes=result.budget_bytes,
        floor_bytes=result.floor_bytes,
    )


def _refuse_constant(results: Mapping[int, Plan | InfeasibleBudget], best: int, most: int) -> None:
    """Refuse sizes that make no difference.

    Raises:
        ValueError: everything that was looked at fits, and takes the same.
    """
    peaks = {r.plain_peak_bytes for r in results.values() if isinstance(r, Plan)}
    if best == most and len(results) > 1 and len(peaks) == 1:
        raise ValueError(
            f"everything from n = {min(results)} to {most} fits and needs the same {format_bytes(*peaks)}: does "
            "make_inputs(n) make use of n?"
        )


def check_limits(budget: int | str, overhead: float, start: int, most: int) -> None:
    """Refuse limits that make no sense.

    Raises:
        ValueError: a budget that is malformed or a share, a negative overhead, a start that is not between 1 and most.
    """
    if isinstance(budget, float) or (isinstance(budget, str) and budget.strip().endswith("%")):
        raise ValueError(f"max_batch needs a budget in bytes, not {budget!r}: the plain peak grows with the batch")
    parse_budget(budget, 1 << 62)
    if not overhead >= 0:
        raise ValueError(f"overhead is the largest share of extra time allowed, 0 or more; got {overhead!r}")
    if not 1 <= start <= most:
        raise ValueError(f"start must be at least 1 and at most most={most}; got {start}")
