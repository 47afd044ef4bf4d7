"""From what is kept to the order of the runs, driven by demand.

Ops run again as late as possible: immediately before the first op of the program that needs the result. What has been
made again stays until its last use, so that a segment runs again once. A second set says which of the values that were
made again do *not* stay and are made once more at the next demand, a third which of those, and so on: nested
checkpointing in the sense of Griewank and Walther (2000), on any graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoremat.planner.search.tables import NEVER, Tables, tables_of
from autoremat.program import Program

Levels = tuple[frozenset[int], ...]
"""What is dropped: from the forward, then of the first copies made again, then of the second ones, ..."""


def unroll(program: Program, keep: frozenset[int], *, drop_again: Levels = ()) -> tuple[int, ...]:
    """The order of runs in which exactly the values ``keep`` (and those that every plan must keep) stay.

    Args:
        program: the step.
        keep: values that stay from their first run until they are last needed.
        drop_again: for the first, second, ... copies made again, the values that do not stay until their last use.

    Returns:
        Op indices in the order they run; ``Schedule.from_order`` adds the frees.

    O(levels * reads).
    """
    tables = tables_of(program)
    dropped = frozenset(tables.droppable) - keep
    return merge(tables, reruns(tables, (dropped, *drop_again)))


def reruns(tables: Tables, levels: Levels) -> list[tuple[int, int]]:
    """The reruns as ``(late op before which it happens, op)``, in no particular order."""
    stay = _staying(tables, levels[0])
    available = list(tables.until)
    found: list[tuple[int, int]] = []
    for again in (*levels[1:], frozenset()):
        times = _sweep(tables, stay, available)
        found += [(time, i) for i, time in times.items()]
        if not again:
            break
        for i, time in times.items():
            for v in tables.ops[i].writes:
                available[v] = tables.stays_until(v, time)
                stay[v] = v not in again
    return found


def _staying(tables: Tables, dropped: frozenset[int]) -> bytearray:
    """For every value 1 when it stays from its first run on."""
    stay = bytearray(kept or keepable for kept, keepable in zip(tables.kept, tables.keepable, strict=True))
    for v in (*dropped, *tables.passing):
        stay[v] = tables.kept[v]
    return stay


def _sweep(tables: Tables, stay: Sequence[int], available: Sequence[int]) -> dict[int, int]:
    """When each op must run again, given what stays and until when the rest is available.

    One pass over the ops, last first: an op is due when the first of its results is demanded, by a late op or by an op
    that runs again itself.
    """
    ops, reads, starts, first_start = tables.ops, tables.reads, tables.starts, tables.first_start
    demand: dict[int, int] = {}
    times: dict[int, int] = {}
    carried: dict[int, int] = {}
    for i in tables.replayed:
        due = carried.get(i, NEVER)
        for v in ops[i].writes:
            if not stay[v]:
                due = min(due, demand.get(v, NEVER))
                if starts[v]:
                    due = min(due, first_start(v, available[v]))
        if due == NEVER:
            continue
        times[i] = due
        if i in tables.before:
            carried[tables.before[i]] = due
        for v in reads[i]:
            if due > available[v] and due < demand.get(v, NEVER):
                demand[v] = due
    return times


def merge(tables: Tables, runs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The program's ops with the reruns before the late ops that wait for them, in program order each."""
    before: dict[int, list[int]] = {}
    for time, i in runs:
        before.setdefault(time, []).append(i)
    order: list[int] = []
    for i in range(len(tables.late)):
        if i in before:
            order += sorted(set(before[i]))
        order.append(i)
    return tuple(order)
