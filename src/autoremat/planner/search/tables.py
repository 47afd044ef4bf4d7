"""What every planner asks of a program, looked up once per program.

Words of this package: an op is *late* when it belongs to the backward; values made by the other ops, *early* ones, are
what a plan may drop and make again. A value is *demanded* at a late op that reads it, once nothing else keeps it in
memory. In a recorded program only an ``unpack`` op can wait for a value to be made again, so a value stays from one
``unpack`` to the last op that reads it before the next ``unpack``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autoremat.planner.search.calls import Folded
from autoremat.planner.search.memo import per_program
from autoremat.program import Op, Program, Value

NEVER: Final = 1 << 60
"""A time after the end of every program."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Facts about one program; sequences are indexed by op or by value.

    Attributes:
        ops: of the program. (The program itself is not held: the tables must not keep it alive.)
        values: of the program.
        producer: of the program.
        late: for every op, whether it belongs to the backward.
        early: indices of the other ops.
        reads: for every op the values read that are not fixed, each once.
        early_readers: for every value the early ops that read it.
        starts: for every early value the late ops at which it can be demanded, ascending.
        ends: for every start the last op that reads the value before the next start.
        until: for every value the op up to which it is resident whatever the plan says.
        keepable: for every value, whether it can stay beyond its last early reader; not when overwritten in place.
        rerunnable: for every op, whether a plan may run it again.
        kept: for every value 1 when every plan keeps it (it cannot be made again, or has no bytes).
        replayed: ops that run again when nothing else is kept, last one first.
        droppable: values that a plan may keep or drop, in program order.
        before: for an op whose reruns include those of another (a stage of a call that of the stage before it)
            that other op; empty where every op runs again by itself.
        seconds: for every op what a rerun costs beyond one of that other op.
        passing: values whose first copy no plan may keep, because the user wants them computed again.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    producer: tuple[int, ...]
    late: tuple[bool, ...]
    early: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    early_readers: tuple[tuple[int, ...], ...]
    starts: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    until: tuple[int, ...]
    keepable: tuple[bool, ...]
    rerunnable: tuple[bool, ...]
    kept: bytes
    replayed: tuple[int, ...]
    droppable: tuple[int, ...]
    before: Mapping[int, int]
    seconds: tuple[float, ...]
    passing: frozenset[int]

    def asked_seconds(self, program: Program) -> float:
        """Seconds of the program's ops that run again in every plan, because late ops ask for what must not stay."""
        again = {program.producer[v] for v in self.passing if self.starts[v]}
        # A hair less, because a plan adds up the same seconds in another order.
        return sum(program.ops[i].again_seconds for i in again) * (1 - 1e-12)

    def first_start(self, value: int, after: int) -> int:
        """The first late op beyond ``after`` at which the value can be demanded, or ``NEVER``."""
        starts = self.starts[value]
        k = bisect_right(starts, after)
        return starts[k] if k < len(starts) else NEVER

    def stays_until(self, value: int, time: int) -> int:
        """The op until which a value that is resident at ``time`` stays without anybody's decision."""
        k = bisect_right(self.starts[value], time) - 1
        return max(time, self.ends[value][k]) if k >= 0 else time


@per_program
def tables_of(program: Program) -> Tables:
    """The tables of a program, made at the first call and kept while the program lives. O(reads)."""
    late = _late_ops(program)
    return _make(program, late, tuple(not x for x in late))


def open_tables_of(program: Program) -> Tables | None:
    """Tables in which every op is early and late at once; None where a program or a user divides forward and backward.

    Where nothing divides them, values of any op may leave and be made again at any op. Then only
    walks (``evict``), which decide as they go, can plan: there is no one moment at which to choose what is kept.
    """
    everywhere = (True,) * len(program.ops)
    if program.passing or any(op.phase == "backward" or op.in_place for op in program.ops):
        return None
    return _make(program, late=everywhere, early=everywhere)


def split_point(program: Program) -> int:
    """The first op of the backward; where nothing says what is backward, the op after the plain peak."""
    for i, op in enumerate(program.ops):
        if op.phase == "backward":
            return i
    return _plain_peak_op(program) + 1


def _plain_peak_op(program: Program) -> int:
    from autoremat.program import simulate

    return simulate(program).peak_op


def _late_ops(program: Program) -> tuple[bool, ...]:
    if any(op.phase == "backward" for op in program.ops):
        return tuple(op.phase == "backward" for op in program.ops)
    split = split_point(program)
    return tuple(i >= split for i in range(len(program.ops)))


def _make(program: Program, late: tuple[bool, ...], early: tuple[bool, ...]) -> Tables:
    values, ops = program.values, program.ops
    reads = tuple(tuple(v for v in dict.fromkeys(op.reads) if not values[v].fixed) for op in ops)
    made_early = [p >= 0 and early[p] for p in program.producer]
    until = _unconditional(program, late, made_early)
    starts, ends = _demands(program, late, made_early, until)
    keepable, lost_late = _overwritten(program, late)
    rerunnable = _rerunnable(program, early, reads, keepable, lost_late)
    kept = bytes(
        (not made_early[v] or not rerunnable[program.producer[v]] or (x.nbytes == 0 and keepable[v]))
        for v, x in enumerate(values)
    )
    replayed, demanded = _closure(program, reads, rerunnable, starts, until, kept)
    before = program.before if isinstance(program, Folded) else {}
    droppable = tuple(v for v in range(len(values)) if v in demanded and keepable[v] and not kept[v])
    return Tables(
        ops,
        values,
        program.producer,
        late,
        tuple(i for i in range(len(ops)) if early[i]),
        reads,
        tuple(tuple(i for i in readers if early[i]) for readers in program.readers),
        starts,
        ends,
        tuple(until),
        keepable,
        rerunnable,
        kept,
        replayed,
        droppable,
        before,
        tuple(op.again_seconds - (ops[before[i]].again_seconds if i in before else 0.0) for i, op in enumerate(ops)),
        frozenset(v for v in program.passing if not kept[v]),
    )


def _unconditional(program: Program, late: Sequence[bool], made_early: Sequence[bool]) -> list[int]:
    """For every value the op up to which it is resident whatever the plan: held, or read by an early op."""
    until = list(program.hold)
    for v, readers in enumerate(program.readers):
        if made_early[v]:
            until[v] = max([until[v], program.producer[v], *(i for i in readers if not late[i])])
    return until


def _demands(
    program: Program, late: Sequence[bool], made_early: Sequence[bool], until: list[int]
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Starts and ends of ``Tables``; moves ``until`` over late readers that cannot wait for a value."""
    unpacks = program.abilities.reruns == "at asks"
    starts: list[tuple[int, ...]] = []
    ends: list[tuple[int, ...]] = []
    for v, readers in enumerate(program.readers):
        first: list[int] = []
        last: list[int] = []
        for i in readers if made_early[v] else ():
            if i <= until[v]:
                continue
            if not unpacks or program.ops[i].kind == "ask":
                first.append(i)
                last.append(i)
            elif first:
                last[-1] = i
            else:
                until[v] = i
        starts.append(tuple(first))
        ends.append(tuple(last))
    return tuple(starts), tuple(ends)


def _overwritten(program: Program, late: Sequence[bool]) -> tuple[tuple[bool, ...], set[int]]:
    """Which values can stay beyond their early readers, and which early ones are overwritten by a late op."""
    keepable = [True] * len(program.values)
    lost_late: set[int] = set()
    for i, op in enumerate(program.ops):
        for _, old in op.in_place:
            if late[i]:
                lost_late.add(old)
            else:
                keepable[old] = False
    return tuple(keepable), lost_late


def _rerunnable(
    program: Program,
    early: Sequence[bool],
    reads: Sequence[Sequence[int]],
    keepable: Sequence[bool],
    lost_late: set[int],
) -> tuple[bool, ...]:
    """Which ops a plan may run again: early, repeatable, and every input can be had then."""
    table: list[bool] = []
    for i, op in enumerate(program.ops):
        inputs = all(keepable[v] or table[program.producer[v]] for v in reads[i])
        table.append(early[i] and not op.once and inputs and lost_late.isdisjoint(reads[i]))
    return tuple(table)


def _closure(
    program: Program,
    reads: Sequence[Sequence[int]],
    rerunnable: Sequence[bool],
    starts: Sequence[Sequence[int]],
    until: Sequence[int],
    kept: bytes,
) -> tuple[tuple[int, ...], set[int]]:
    """The ops that run again when nothing but ``kept`` is kept, last first, and the values demanded then."""
    # A held value is no reason to stop: what runs again after the hold may ask for it.
    demanded = {v for v, s in enumerate(starts) if s}
    replayed: list[int] = []
    for i in range(len(program.ops) - 1, -1, -1):
        if rerunnable[i] and any(v in demanded and not kept[v] for v in program.ops[i].writes):
            replayed.append(i)
            demanded.update(reads[i])
    last = len(program.ops) - 1
    return tuple(replayed), {v for v in demanded if until[v] < last}
