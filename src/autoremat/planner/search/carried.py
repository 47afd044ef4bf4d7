"""A plan of one program as a candidate of another: a few ops more or fewer, other sizes, another path in places.

Ops are matched by name, module and which one it is of those in its phase. What ran again there runs again here, at the
same op; what has no match stays in memory. Every such order can be carried out, because a value that nobody makes again
is there from its first run on. So matching wrongly costs bytes and seconds, and nothing else; the moves of the search
mend that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from autoremat.planner.search.calls import Folded, planned_as
from autoremat.planner.search.search import Candidate, Search
from autoremat.planner.search.unrolled import Levels
from autoremat.program import Plan, Program

_NAME = "carried over"
Runs = list[tuple[int, int]]


def carried_over(search: Search, program: Program, plan: Plan, budget_bytes: int) -> list[Candidate]:
    """Candidates that recompute what a plan of a similar program recomputes: run by run, and what it drops, shaved.

    They may be above the budget.

    Args:
        search: of the program.
        program: what to plan.
        plan: of the similar one.
        budget_bytes: of the peak.

    O(ops + runs), and the moves of the search.
    """
    runs = [run for run in matched_runs(program, plan) if search.tables.rerunnable[run[1]]]
    if not runs:
        return []
    dropped = search.evaluate(_NAME, _levels_of(search, runs))
    return [search.reuse(_NAME, runs, budget_bytes), search.shave(dropped, budget_bytes)]


def matched_runs(program: Program, plan: Plan) -> Runs:
    """The reruns of a plan in the ops of ``planned_as`` of another program, each with the op that it is before."""
    planned = planned_as(program)
    stage_of = _stage_of(planned, len(program.ops))
    there = {key: i for i, key in enumerate(_keys(program))}
    match = [there.get(key, -1) for key in _keys(plan.program)]
    order, found, due = plan.schedule.order, set[tuple[int, int]](), -1
    first_at = {i: p for p, i in reversed(list(enumerate(order)))}
    for p, i in reversed(list(enumerate(order))):
        stage = stage_of[match[i]] if match[i] >= 0 else -1
        if first_at[i] == p:
            due = due if stage < 0 else stage
        elif 0 <= stage < due:
            found.add((due, stage))
    return sorted(found)


def _keys(program: Program) -> Iterator[tuple[str, str, str, int]]:
    """What an op has in common with its match."""
    counts = Counter[tuple[str, str, str]]()
    for op in program.ops:
        key = op.phase, op.module, op.name
        yield *key, counts[key]
        counts[key] += 1


def _stage_of(planned: Program, n_ops: int) -> list[int]:
    if not isinstance(planned, Folded):
        return list(range(n_ops))
    return [k for k, stage in enumerate(planned.stages) for _ in range(stage.begin, stage.end + 1)]


def _levels_of(search: Search, runs: Runs) -> Levels:
    """What is dropped from the forward, of the first copies made again, of the second ones, ..."""
    times, tables = Counter(i for _, i in runs), search.tables
    return tuple(
        frozenset(v for v in tables.droppable if times[tables.producer[v]] > level)
        for level in range(max(times.values()))
    )
