"""Segments under a threshold, and the search for it.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", Algorithm 3 (memory planning with budget): go through
the forward, add up what the ops make, and keep the state at the first candidate point where the sum exceeds the
threshold b; start again from 0. The search of appendix A: a run at threshold 0 gives x, the bytes kept, and y, the most
bytes of a segment; B = sqrt(x * y) is about what the larger of the two must be; then a grid of six points around B.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, sqrt

from autoremat.planner.search.chain import Chain, Runs, chain_of, pick
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import reruns
from autoremat.planner.solvers.segments import crossing, saved_bytes
from autoremat.program import Program, Schedule

_GRID = 6


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Choose the best of eight thresholds that fits.

    They are 0, B and six points from B / 2 to 2 B. O(values) per threshold.
    """
    return pick(program, budget_bytes, chen_plans(chain_of(tables_of(program))))


def chen_plans(chain: Chain) -> Iterator[Runs]:
    """Make the plans of the appendix's search."""
    for threshold in thresholds(chain):
        cuts, _, _ = greedy_cuts(chain, threshold)
        kept = crossing(chain.tables, cuts)
        yield reruns(chain.tables, (frozenset(chain.tables.droppable) - kept,))


def thresholds(chain: Chain) -> list[float]:
    """List 0, B = sqrt(x * y), and six points around B.

    They are on [B / 2, 2 B], in equal ratios.
    """
    _, kept, largest = greedy_cuts(chain, 0)
    middle = sqrt(kept * largest)
    grid = (middle * 2 ** (2 * k / (_GRID - 1) - 1) for k in range(_GRID))
    return list(dict.fromkeys((0.0, middle, *grid)))


def greedy_cuts(chain: Chain, threshold: float) -> tuple[tuple[int, ...], int, int]:
    """Cut the chain by algorithm 3.

    With the cuts come x (bytes of the states kept there) and y (most bytes of a segment).
    """
    chosen: list[int] = []
    kept = largest = bytes_so_far = 0
    for made, cut, state in zip(_made(chain), (*chain.cuts, None), (*chain.states[1:], ()), strict=True):
        bytes_so_far += made
        largest = max(largest, bytes_so_far)
        if cut is not None and bytes_so_far > threshold:
            chosen.append(cut)
            kept += chain.bytes_of(state)
            bytes_so_far = 0
    return tuple(chosen), kept, largest


def _made(chain: Chain) -> list[int]:
    """Count, for every block, the bytes that plain training keeps."""
    tables, made = chain.tables, [0] * len(chain)
    block = 0
    for i in tables.early:
        while block < len(chain.cuts) and i >= chain.cuts[block]:
            block += 1
        made[block] += saved_bytes(tables, i)
    return made
