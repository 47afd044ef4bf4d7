"""Recursive checkpointing: k log_{k+1} n memory for n blocks.

``g(n) = k + g(n / (k + 1)) = k log_{k+1} n`` for a chain.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.4: keep k states that cut
the chain into k + 1 equal parts, and treat every part the same way when its backward comes. With k = 1 a chain of n
layers needs O(log n) memory and O(n log n) forward steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import inf

from autoremat.planner.search.chain import Chain, Runs, Sweep, chain_of, pick
from autoremat.planner.search.tables import tables_of
from autoremat.program import Program, Schedule


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Choose the recursion with the best k that fits."""
    return pick(program, budget_bytes, chen_recursive_plans(chain_of(tables_of(program))))


def chen_recursive_plans(chain: Chain) -> Iterator[Runs]:
    """Make a plan for every k up to the number of blocks.

    They are k = 1, 2, 3, 4, 6, 9, 13, ....
    """
    k = 1
    while True:
        yield chain.runs(recursive_sweeps(len(chain), k))
        if k + 1 >= len(chain):
            return
        k = min(len(chain) - 1, max(k + 1, k * 3 // 2))


def recursive_sweeps(blocks: int, kept: int) -> Iterator[Sweep]:
    """List the sweeps when every recursion keeps so many states.

    They come after the first forward pass. O(sweeps).
    """
    left = [(0, blocks)]
    while left:
        base, n = left.pop()
        if n < blocks:
            yield Sweep(base + n - 1, base)
        while n > 1:
            parts = min(n, kept + 1)
            begin = [base + n * j // parts for j in range(parts + 1)]
            left += [(a, b - a) for a, b in pairwise(begin[:-1])]
            base, n = begin[-2], begin[-1] - begin[-2]
