"""Segments: keep only what crosses from one to the next.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.1: a chain of n equal layers in sqrt(n)
segments needs O(sqrt(n)) memory for one further forward run. Here the forward of any program is cut at places where
few bytes cross, so that the saved bytes between cuts are about equal.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf, isqrt

from autoremat.planner.search.tables import Tables, tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.program import Program, Schedule


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Cut into about sqrt(n) segments, whatever the budget.

    n is the number of forward ops that may run again. O(n log n).
    """
    tables = tables_of(program)
    count = max(1, isqrt(len(tables.replayed)))
    return Schedule.from_order(program, unroll(program, crossing(tables, boundaries(tables, count))))


def boundaries(tables: Tables, count: int, *, tapered: bool = False) -> tuple[int, ...]:
    """Find the early ops at which segments begin.

    There are about ``count`` segments, fewer where no more cuts exist.

    ``tapered`` makes the segments shrink linearly towards the end: while an early segment runs again, what the later
    ones kept has left, so it may be larger (for the uniform chain this is the optimal shape with one rerun).
    """
    weight = list(accumulate(saved_bytes(tables, i) for i in tables.early))
    if not weight or count < 2:
        return ()
    bytes_at = crossing_bytes(tables)
    total, chosen = weight[-1], set[int]()
    shares = [k / count for k in range(count + 1)]
    targets = [total * (1 - (1 - s) ** 2 if tapered else s) for s in shares]
    for before, target, after in zip(targets, targets[1:], targets[2:], strict=False):
        low = bisect_left(weight, target - (target - before) / 2)
        high = bisect_right(weight, target + (after - target) / 2)
        best = min(range(low, max(high, low + 1)), key=lambda k: (bytes_at[k], abs(weight[k] - target)), default=0)
        if bytes_at[best] < FORBIDDEN and best + 1 < len(tables.early):
            chosen.add(tables.early[best + 1])
    return tuple(sorted(chosen))


FORBIDDEN = 1 << 60
"""Bytes that stand for "no cut here": between an op and those that overwrite or read what cannot be kept."""


def narrow_cuts(tables: Tables) -> tuple[int, ...]:
    """Find early ops before which at most one droppable value crosses.

    There are none if that leaves too large a block.

    Too large is a block with more than a quarter of the bytes that the backward needs. O(reads).
    """
    position = {i: k for k, i in enumerate(tables.early)}
    steps = [0] * (len(tables.early) + 1)
    for v in tables.droppable:
        again = [i for i in tables.early_readers[v] if tables.rerunnable[i]]
        if again:
            steps[position[tables.producer[v]]] += 1
            steps[position[again[-1]]] -= 1
    nbytes = crossing_bytes(tables)
    narrow = [k for k, count in enumerate(list(accumulate(steps))[:-2]) if count <= 1 and nbytes[k] < FORBIDDEN]
    weight = list(accumulate((saved_bytes(tables, i) for i in tables.early), initial=0))
    ends = [0, *(k + 1 for k in narrow), len(tables.early)]
    if any(weight[b] - weight[a] > weight[-1] / 4 for a, b in pairwise(ends) if b - a > 1):
        return ()
    return tuple(tables.early[k + 1] for k in narrow)


def saved_bytes(tables: Tables, op: int) -> int:
    """Count the op's bytes that the backward asks for."""
    return sum(tables.values[v].nbytes for v in tables.ops[op].writes if tables.starts[v])


def crossing_bytes(tables: Tables) -> list[int]:
    """Count, for every early op, what a cut after it keeps.

    They are bytes, by position.
    """
    position = {i: k for k, i in enumerate(tables.early)}
    steps = [0] * (len(tables.early) + 1)
    for v, readers in enumerate(tables.early_readers):
        producer = tables.producer[v]
        again = [i for i in readers if tables.rerunnable[i]]
        if producer in position and again:
            nbytes = tables.values[v].nbytes if tables.keepable[v] else FORBIDDEN
            steps[position[producer]] += nbytes
            steps[position[again[-1]]] -= nbytes
    return list(accumulate(steps))[:-1]


def segment_of(tables: Tables, cuts: Sequence[int]) -> list[int]:
    """Number the segment of every op.

    That of late ops is that of the last early op before them.
    """
    return [bisect_right(cuts, i) for i in range(len(tables.late))]


def crossing(tables: Tables, cuts: Sequence[int]) -> frozenset[int]:
    """Collect droppable values that a later segment's reruns read."""
    home = segment_of(tables, cuts)
    return frozenset(
        v
        for v in tables.droppable
        if any(home[i] != home[tables.producer[v]] and tables.rerunnable[i] for i in tables.early_readers[v])
    )
