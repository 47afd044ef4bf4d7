"""Which values of a schedule to move to the tier, and when, so that its peak comes down to a budget.

A value may be away while nobody uses it: between two uses of one residency, once nothing holds it. All bytes cost the
link the same, so what is idle for the longest time is moved: its copies have the most time to run beside the ops. Of
what is moved, memory is given up as late as the budget allows, and asked for again as early as the copy back needs, as
far as there is room. Where that does not bring the peak within the budget, nothing is moved.

Bytes are exact, and follow from the order alone; seconds are those of ``simulate``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
import numpy.typing as npt

from autoremat.planner import clock
from autoremat.program import INSIDE, Offload, Program, Schedule, simulate

Ints = npt.NDArray[np.int64]
_AHEAD = (1.5, 1.05, 3.0)
"""How many times as long as the copy back takes it begins ahead; tried one after the other."""
_GAP_SECONDS = 2e-6
"""What a look at a gap counts as work."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A span in which a value is in memory, and nobody uses it.

    Attributes:
        value: which.
        nbytes: of the value.
        begin: the first place at which it can go: ahead of that run.
        end: the last place at which it can come back: ahead of that run.
        ready: the first place at which it may be sent; others may still read it then.
    """

    value: int
    nbytes: int
    begin: int
    end: int
    ready: int


def moved(
    program: Program, schedule: Schedule, budget_bytes: int, *, first: frozenset[int] = frozenset()
) -> Schedule | None:  # fmt: skip
    """The schedule with values moved to the tier so that its peak is within a budget; None where that is not known.

    Args:
        program: with a link.
        schedule: without offloads.
        budget_bytes: of the peak.
        first: values to move before all others.
    """
    moving = Moving(program, schedule, first)
    if moving.peak_bytes <= budget_bytes:
        return schedule
    ways = [(ahead, at_once) for at_once in moving.sends for ahead in _AHEAD]
    found = [s for ahead, at_once in ways if (s := moving.within(budget_bytes, ahead, at_once=at_once)) is not None]
    return min(found, key=lambda s: simulate(program, s).overhead_seconds, default=None)


class Moving:
    """Moves values of one schedule.

    Args:
        program: with a link.
        schedule: without offloads.
        first: values to move before all others.
    """

    def __init__(self, program: Program, schedule: Schedule, first: frozenset[int] = frozenset()) -> None:
        assert program.link is not None
        self._program, self._schedule, self._link = program, schedule, program.link
        self._during: Ints = np.array(simulate(program, schedule).resident_bytes, dtype=np.int64)
        seconds, seen = [0.0], set[int]()
        for i in schedule.order:
            op = program.ops[i]
            seconds.append(seconds[-1] + (op.again_seconds if i in seen else op.seconds))
            seen.add(i)
        self._at = seconds
        """For every run the seconds at which it begins, if nothing is waited for."""
        self._places = places(program, schedule)
        self._gaps = sorted(
            gaps(program, schedule, self._places),
            key=lambda g: (g.value not in first, self._at[g.begin] - self._at[g.end]),
        )

    @property
    def peak_bytes(self) -> int:
        """The peak with nothing moved."""
        return int(self._during.max(initial=0))

    @property
    def least_bytes(self) -> int:
        """The peak with everything moved that may be."""
        during = self._during.copy()
        for gap in self._gaps:
            during[gap.begin : gap.end] -= gap.nbytes
        return int(during.max(initial=0))

    @property
    def sends(self) -> tuple[bool, ...]:
        """Whether values may be sent at once, beside being sent once they are idle."""
        return (False, True) if any(g.ready < g.begin for g in self._gaps) else (False,)

    def within(self, budget_bytes: int, ahead: float, *, at_once: bool = False) -> Schedule | None:
        """Move what it takes to come down to a budget; copies back begin so many times their length ahead.

        With ``at_once`` values are sent as soon as they are there, also while others still read them.
        """
        chosen = self._chosen(budget_bytes)
        if chosen is None:
            return None
        going = self._going(chosen, budget_bytes)
        if going is None:
            return None
        offloads = self._coming(going, budget_bytes, ahead, at_once=at_once)
        return replace(self._schedule, offloads=tuple(sorted(offloads, key=lambda o: (o.send, o.gone, o.here))))

    def _chosen(self, budget_bytes: int) -> list[Gap] | None:
        """The longest gaps that bring every run within the budget, without those that turn out to be needless."""
        during, room = self._during.copy(), inf if self._link.tier_bytes is None else self._link.tier_bytes
        left, chosen = list(self._gaps), list[Gap]()
        while (p := int(during.argmax())) >= 0 and during[p] > budget_bytes:
            over = int(during[p]) - budget_bytes
            fitting = [g for g in left if g.begin <= p < g.end and g.nbytes <= room]
            clock.spend(_GAP_SECONDS * len(left))
            if not fitting or clock.is_over():
                return None
            gap = next((g for g in fitting if g.nbytes * 16 >= over), max(fitting, key=lambda g: g.nbytes))
            left.remove(gap)
            chosen.append(gap)
            during[gap.begin : gap.end] -= gap.nbytes
            room -= gap.nbytes
        for gap in sorted(chosen, key=lambda g: self._at[g.end] - self._at[g.begin]):
            if (during[gap.begin : gap.end] + gap.nbytes <= budget_bytes).all():
                chosen.remove(gap)
                during[gap.begin : gap.end] += gap.nbytes
        return chosen

    def _going(self, chosen: Sequence[Gap], budget_bytes: int) -> list[tuple[Gap, int]] | None:
        """Each gap with the place at which its memory is given up: as late as the budget allows, the first sent first.

        None where a value would have to be gone before it can.
        """
        during, waiting, found = self._during.copy(), sorted(chosen, key=lambda g: g.begin), list[tuple[Gap, int]]()
        for p in range(len(during)):
            while during[p] > budget_bytes:
                gap = next((g for g in waiting if g.begin <= p < g.end), None)
                if gap is None:
                    return None
                waiting.remove(gap)
                place = self._places[bisect_right(self._places, p) - 1]
                place = max(place, gap.begin)
                during[place : gap.end] -= gap.nbytes
                found.append((gap, place))
        return found

    def _coming(
        self, going: Sequence[tuple[Gap, int]], budget_bytes: int, ahead: float, *, at_once: bool
    ) -> Iterator[Offload]:  # fmt: skip
        """The offloads, with copies back that begin as early as their length asks for and the budget allows."""
        during, due, begin_by = self._during.copy(), inf, dict[Gap, float]()
        for gap, place in going:
            during[place : gap.end] -= gap.nbytes
        for gap, _ in sorted(going, key=lambda x: -x[0].end):
            due = min(due, self._at[gap.end]) - ahead * self._link.in_seconds(gap.nbytes)
            begin_by[gap] = due
        for gap, place in sorted(going, key=lambda x: x[0].end):
            over = np.flatnonzero(during[place : gap.end] + gap.nbytes > budget_bytes)
            earliest = place + 1 + (int(over[-1]) if len(over) else 0)
            wanted = bisect_right(self._at, begin_by[gap]) - 1
            k = bisect_left(self._places, max(earliest, min(wanted, gap.end)))
            fetch = self._places[k] if k < len(self._places) and self._places[k] <= gap.end else gap.end
            during[fetch : gap.end] += gap.nbytes
            yield Offload(gap.value, (gap.ready if at_once else gap.begin) - 1, place - 1, fetch, gap.end)


def places(program: Program, schedule: Schedule) -> list[int]:
    """The runs ahead of which values may move: all, or those at which the engine that runs calls has a say."""
    by_calls = any(op.call >= 0 for op in program.ops)
    if program.abilities.reruns != "at asks" and not by_calls:
        return list(range(1, len(schedule.order)))
    found, seen, was_again, before = list[int](), set[int](), False, -1
    for p, i in enumerate(schedule.order):
        op = program.ops[i]
        if i in seen or op.kind == "ask":
            begins = not was_again
        elif by_calls:
            begins = op.call >= 0 and op.call != before
        else:
            begins = op.phase == "forward"
        if begins and p:
            found.append(p)
        was_again, before = i in seen, op.call
        seen.add(i)
    return found


def gaps(program: Program, schedule: Schedule, where: Sequence[int]) -> Iterator[Gap]:
    """Every span in which a value is in memory and may be away.

    Args:
        program: of the step.
        schedule: without offloads.
        where: ahead of which runs values may move, ascending.
    """
    first: dict[int, int] = {}
    for p, i in enumerate(schedule.order):
        first.setdefault(i, p)
    able, waits = _movable(program), any(op.call >= 0 for op in program.ops)
    last: dict[int, int] = {}
    since: dict[int, int] = {}
    until = [first.get(h, -1) for h in program.hold]
    for p, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        op = program.ops[i]
        for v in {*op.reads, *op.writes}:
            if v in last and able[v]:
                begin = bisect_right(where, max(last[v], until[v]))
                end = bisect_right(where, p) - 1
                if begin < end:
                    # The tape has a value from the call on that saves it for the backward.
                    ready = where[begin if waits else bisect_right(where, since[v])]
                    yield Gap(v, program.values[v].nbytes, where[begin], where[end], ready)
                    since[v] = p
            last[v] = p
            since.setdefault(v, p)
        if op.kind == "ask":
            for v in op.reads:
                until[v] = max(until[v], first.get(program.handed_until[i], p))
        for v in frees:
            last.pop(v, None)
            since.pop(v, None)


def _movable(program: Program) -> list[bool]:
    """For every value whether it may be moved: not if it is fixed, has no bytes, or never leaves its call.

    The tape of the eager engine moves what calls of the forward have made.
    """
    by_calls = program.abilities.reruns == "at asks" and any(op.call >= 0 for op in program.ops)
    found = []
    for v, value in enumerate(program.values):
        maker = program.producer[v]
        able = maker >= 0 and value.nbytes > 0 and value.available != INSIDE
        if able and by_calls:
            able = program.ops[maker].call >= 0
        found.append(able)
    return found
