"""Schedules as decisions: each value is kept for the backward, or recomputed.

What of a schedule can be said in this way, and what cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum

from autoremat.program.model import Program
from autoremat.program.schedule import Schedule


class Decision(Enum):
    """Says what happens to a forward value that the backward reads."""

    KEEP = "stays in memory until its last reader of the backward has run"
    RECOMPUTE = "leaves in the forward, and is computed again when the backward needs it, once"


def decisions_of(program: Program, schedule: Schedule) -> Mapping[str, Decision]:
    """Tell which values are kept for the backward, and which recomputed.

    They are those that the forward makes and the backward reads, by id.

    The backward reads what its ops read, and what is read by ops that run again in it. An engine that knows nothing
    else carries out what these say; ``beyond_decisions`` tells what they leave out. O(runs + reads).

    Example:
        >>> from autoremat.program import Op, Value
        >>> values = Value("x", 4, fixed=True), Value("a", 8), Value("b", 8), Value("da", 8)
        >>> ops = Op("f", (0,), (1,)), Op("g", (1,), (2,)), Op("dg", (1, 2), (3,), phase="backward")
        >>> program = Program("tiny", values, ops)
        >>> schedule = Schedule.from_order(program, [0, 1, 0, 2])
        >>> {v: decision.name for v, decision in decisions_of(program, schedule).items()}
        {'a': 'RECOMPUTE', 'b': 'KEEP'}
        >>> beyond_decisions(program, schedule)
        ()
    """
    begin = _backward_begins(program, schedule)
    again = {v for i in _again(program, schedule, begin) for v in program.ops[i].writes}
    read = dict.fromkeys(v for i in schedule.order[begin:] for v in program.ops[i].reads)
    return {
        program.values[v].id: Decision.RECOMPUTE if v in again else Decision.KEEP
        for v in sorted(read)
        if program.producer[v] >= 0 and program.ops[program.producer[v]].phase == "forward"
    }


def can_carry_out(program: Program, schedule: Schedule) -> bool:
    """Tell whether a program's engine can run a schedule's reruns.

    O(runs + reads).
    """
    if not program.abilities.can_run(schedule.runs_of):
        return False
    return program.abilities.reruns != "by decisions" or not beyond_decisions(program, schedule)


def beyond_decisions(program: Program, schedule: Schedule) -> tuple[str, ...]:
    """List, in sentences, what a schedule does that no decisions say.

    An engine that knows only decisions must refuse it.

    Example:
        >>> from autoremat.program import Op, Value
        >>> values = Value("x", 4, fixed=True), Value("a", 8), Value("da", 8)
        >>> program = Program("tiny", values, (Op("f", (0,), (1,)), Op("df", (1,), (2,), phase="backward")))
        >>> beyond_decisions(program, Schedule.from_order(program, [0, 0, 0, 1]))
        ('op 0 (f) runs 3 times; decisions have it run twice at most',)
    """
    return tuple(_beyond(program, schedule))


def _beyond(program: Program, schedule: Schedule) -> Iterator[str]:
    begin = _backward_begins(program, schedule)
    for i, n in sorted(schedule.runs_of.items()):
        if n > 2:
            yield f"op {i} ({program.ops[i].name}) runs {n} times; decisions have it run twice at most"
    seen: set[int] = set()
    for p, i in enumerate(schedule.order[:begin]):
        if i in seen:
            yield f"op {i} ({program.ops[i].name}) runs again in the forward (run {p}), of which decisions say nothing"
        seen.add(i)
    left = _first_leaves(schedule)
    for v in sorted(v for i in _again(program, schedule, begin) for v in program.ops[i].writes):
        if left.get(v, len(schedule.order)) >= begin:
            yield f"value {program.values[v].id} stays into the backward and is made again; decisions say one of both"


def _again(program: Program, schedule: Schedule, begin: int) -> list[int]:
    """Find the forward's ops that run in the backward."""
    return sorted({i for i in schedule.order[begin:] if program.ops[i].phase == "forward"})


def _first_leaves(schedule: Schedule) -> dict[int, int]:
    """Find the run after which each value leaves first."""
    found: dict[int, int] = {}
    for p, frees in enumerate(schedule.frees):
        for v in frees:
            found.setdefault(v, p)
    return found


def _backward_begins(program: Program, schedule: Schedule) -> int:
    """Find the backward's first run.

    That is a run of one of its ops, or of what runs again right ahead of it.
    """
    order = schedule.order
    first = {i: p for p, i in reversed(list(enumerate(order)))}
    begin = next((p for p, i in enumerate(order) if program.ops[i].phase == "backward"), len(order))
    while begin and first[order[begin - 1]] < begin - 1:
        begin -= 1
    return begin
