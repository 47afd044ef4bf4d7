"""What is in memory at every run at once, and as what.

Each span says from when to when.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from autoremat.program import Offload, Program, Schedule
from autoremat.program.lifetimes import block_ends
from autoremat.show.residents import KIND_CATEGORIES


class Span(NamedTuple):
    """A value in memory from run ``begin`` through run ``end``.

    It has one category for all of that time.

    ``nbytes`` are those of the value, but for the run of an in-place op that shrinks its storage, which is still there.
    """

    value: int
    begin: int
    end: int
    category: str
    nbytes: int


@dataclass(slots=True)
class _Copy:
    """A value since run ``begin``, with its spans so far.

    In these a backward or a rerun waits for it.

    At its first run the storage has ``shrinks_by`` more bytes than the value.
    """

    begin: int
    again: bool
    shrinks_by: int
    waits: list[tuple[int, int]] = field(default_factory=list)


def spans_of(program: Program, schedule: Schedule) -> tuple[Span, ...]:
    """List all spans by rising ``begin``.

    Their bytes and the scratch of the op add up to ``simulate``'s at every run.

    The categories are those of ``residents_at``, without its detour over every single run. O(runs + reads).
    """
    last = len(schedule.order) - 1
    found = [
        Span(v, 0, last, _fixed_category(value.kind), value.nbytes)
        for v, value in enumerate(program.values)
        if value.fixed and last >= 0
    ]
    found += _written_spans(program, schedule)
    for o in schedule.offloads:
        found = [part for span in found for part in _without(span, o)]
    return tuple(sorted(found, key=lambda s: (s.begin, s.value, s.end)))


def _without(span: Span, o: Offload) -> Iterator[Span]:
    """Yield the parts of a span in which the value is present.

    In the rest it is away, in the tier.
    """
    if span.value != o.value or span.end <= o.gone or span.begin >= o.fetch:
        yield span
        return
    if span.begin <= o.gone:
        yield span._replace(end=o.gone)
    if span.end >= o.fetch:
        yield span._replace(begin=o.fetch)


def _written_spans(program: Program, schedule: Schedule) -> Iterator[Span]:
    """List the spans of what the ops write."""
    copies: dict[int, _Copy] = {}
    first_run: dict[int, int] = {}
    ends = block_ends(program, schedule.order)
    for p, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        op, again = program.ops[i], i in first_run
        first_run.setdefault(i, p)
        if again or op.phase == "backward":
            for v in op.reads:
                if v in copies:  # fixed values have one category
                    copies[v].waits.append((-1 if op.phase == "backward" else first_run[i], p))
        taken = {new: old for new, old in op.in_place if old in frees}
        for old in taken.values():  # from here on its storage belongs to what is written
            yield from _ended(program, old, copies.pop(old), p - 1)
        for v in op.writes:
            if v in copies and again and program.available[v] > schedule.order[ends[p]]:
                yield from _ended(program, v, _Copy(p, again, 0), ends[p])  # only its call can read that one
                continue
            if v in copies:
                yield from _ended(program, v, copies.pop(v), ends[p])
            copies[v] = _Copy(p, again, _shrinks_by(program, v, taken.get(v, v)))
        for v in set(frees).difference(taken.values()):
            yield from _ended(program, v, copies.pop(v), p)
    for v, copy in copies.items():
        yield from _ended(program, v, copy, len(schedule.order) - 1)


def _shrinks_by(program: Program, new: int, old: int) -> int:
    """Count the bytes that a storage loses when it is taken over."""
    return max(0, program.values[old].nbytes - program.values[new].nbytes)


def _ended(program: Program, v: int, copy: _Copy, end: int) -> Iterator[Span]:
    """Close the spans of a copy whose last run is known."""
    nbytes, begin = program.values[v].nbytes, copy.begin
    parts = [*_parts(program, v, copy, end)]
    if copy.shrinks_by and parts:
        yield Span(v, begin, begin, parts[0][2], nbytes + copy.shrinks_by)
        parts[0] = (begin + 1, *parts[0][1:])
    yield from (Span(v, b, e, category, nbytes) for b, e, category in parts if b <= e)


def _parts(program: Program, v: int, copy: _Copy, end: int) -> Iterator[tuple[int, int, str]]:
    """Split a span into ``(begin, end, category)``.

    It is saved while a backward or a rerun waits for it, and temporary besides.
    """
    kind = KIND_CATEGORIES.get(program.values[v].kind)
    home = program.ops[program.producer[v]]
    if kind or copy.again or home.phase != "forward":
        yield copy.begin, end, kind or ("recomputed activations" if copy.again else "temporaries")
        return
    at = copy.begin
    for b, e in _joined((max(b, copy.begin), min(e, end)) for b, e in copy.waits):
        if at < b:
            yield at, b - 1, "temporaries"
        yield b, e, "saved activations"
        at = e + 1
    if at <= end:
        yield at, end, "temporaries"


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that overlap or touch as one."""
    joined: list[tuple[int, int]] = []
    for b, e in sorted(spans):
        if joined and b <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(e, joined[-1][1])
        else:
            joined.append((b, e))
    return joined


def _fixed_category(kind: str) -> str:
    return KIND_CATEGORIES.get(kind, "inputs")
