"""Revolve: the optimal schedule of a uniform chain, in closed form.

Griewank and Walther 2000, "Algorithm 799: revolve: an implementation of checkpointing for the reverse or adjoint mode
of computational differentiation". A chain of n equal steps with s slots for states, the initial one included, needs
``r * n - C(s + r, r - 1)`` forward steps beyond the first n, r the least integer with ``C(s + r, s) >= n``; no schedule
needs fewer. On any other program the blocks of its chain are taken for equal steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import comb, inf

from autoremat.planner.search.account import Accountant
from autoremat.planner.search.call_account import accountant_of
from autoremat.planner.search.chain import Chain, Runs, Sweep, chain_of, pick
from autoremat.planner.search.tables import tables_of
from autoremat.program import Program, Schedule

_MOST_RUNS = 100_000
"""How many forward steps the schedule with the fewest slots may have; on long chains 20 of each step."""


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Revolve with the most slots that fit. O(runs * log blocks)."""
    tables, accountant = tables_of(program), accountant_of(program)
    return pick(program, budget_bytes, revolve_plans(chain_of(tables), accountant, budget_bytes))


def revolve_plans(chain: Chain, accountant: Accountant, budget_bytes: int) -> Iterator[Runs]:
    """Make plans with the fewest slots and the most that fit."""
    fewest = fewest_slots(len(chain))

    def fits(slots: int) -> bool:
        return accountant(accountant.order(revolve_runs(chain, slots))).peak_bytes <= budget_bytes

    most = most_that_fit(len(chain), lambda s: s <= fewest or fits(s))
    for slots in dict.fromkeys((fewest, most)):
        yield revolve_runs(chain, slots)


def revolve_runs(chain: Chain, slots: int) -> Runs:
    """List Revolve's reruns with so many slots, initial state included."""
    return chain.runs(revolve_sweeps(len(chain), slots))


def most_that_fit(most: int, fits: Callable[[int], bool]) -> int:
    """Find the largest number up to ``most`` that fits.

    Those below one that fits do; it is 1 where none does.
    """
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def fewest_slots(steps: int) -> int:
    """Find the fewest slots worth asking for.

    It is one on all but long chains, whose schedule would never end.
    """
    return most_that_fit(steps, lambda s: s == 1 or revolve_forwards(steps, s - 1) > max(_MOST_RUNS, 20 * steps))


def revolve_forwards(steps: int, slots: int) -> int:
    """Count all forward steps, first runs included.

    Section 2, equation 5. O(repetitions).

    Raises:
        ValueError: fewer than one step or slot.
    """
    r = _repetitions(steps, slots)
    return (r + 1) * steps - (comb(slots + r, r - 1) if r else 0)


def revolve_split(steps: int, slots: int) -> int:
    """Find after how many steps the next state is kept.

    It is the largest optimal number. O(repetitions).
    """
    if slots == 1:
        return steps - 1
    r = _repetitions(steps, slots)
    return min(comb(slots + r - 1, slots), steps - (comb(slots + r - 2, slots - 1)))


def revolve_sweeps(steps: int, slots: int) -> Iterator[Sweep]:
    """List the sweeps after the first forward pass, in order.

    O(sweeps + splits).
    """
    left: list[tuple[int, int, int]] = [(0, steps, slots)]
    while left:
        base, n, free = left.pop()
        if n < steps:
            yield Sweep(base + n - 1, base)
        while n > 1:
            k = revolve_split(n, free)
            left.append((base, k, free))
            base, n, free = base + k, n - k, free - 1


def _repetitions(steps: int, slots: int) -> int:
    if steps < 1 or slots < 1:
        raise ValueError(f"a chain needs at least one step and one slot, got {steps} steps and {slots} slots")
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
    return r
