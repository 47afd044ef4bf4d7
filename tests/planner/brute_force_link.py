"""The cheapest schedule of all where values may be moved over a link: Dijkstra over the clock, for tiny programs.

A state is what has run, what is where, and how long each copy and the link still take; whole seconds, so that states
are finite. Whatever a schedule with offloads may do is a way through them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from autoremat.program import Program

Copies = frozenset[tuple[int, float]]
"""Values on their way, with the seconds until each has arrived."""


class State(NamedTuple):
    """Where everything is; ``fetching`` says that nothing may be sent any more before the next run."""

    following: int
    resident: frozenset[int]
    leaving: Copies
    away: frozenset[int]
    coming: Copies
    busy: float
    fetching: bool


def optimum_with_link(program: Program, budget_bytes: int) -> float | None:
    """Least extra seconds of any schedule within the budget, None when there is none. Exponential."""
    wanted = _wanted(program)
    start = State(0, frozenset(), frozenset(), frozenset(), frozenset(), 0.0, fetching=False)
    queue: list[tuple[float, int, State]] = [(0.0, 0, start)]
    fronts, count = dict[State, list[Moments]](), 0
    while queue:
        extra, _, state = heapq.heappop(queue)
        if state.following == len(program.ops) and not (state.leaving or state.away or state.coming):
            return extra
        if not _is_new(fronts, extra, state):
            continue
        for cost, following in _steps(program, budget_bytes, state, wanted[state.following]):
            count += 1
            heapq.heappush(queue, (extra + cost, count, following))
    return None


Moments = tuple[float, ...]


def _is_new(fronts: dict[State, list[Moments]], extra: float, state: State) -> bool:
    """Whether no known state has the same in the same places, and all of it no later."""
    out, back = dict(state.leaving), dict(state.coming)
    key = state._replace(leaving=frozenset((v, 0.0) for v in out), coming=frozenset((v, 0.0) for v in back), busy=0.0)
    lefts = (0.0, state.busy, *(out[v] for v in sorted(out)), *(back[v] for v in sorted(back)))
    moments = tuple(extra + left for left in lefts)
    front = fronts.setdefault(key, [])
    if any(all(a <= b for a, b in zip(known, moments, strict=True)) for known in front):
        return False
    front[:] = [known for known in front if any(a < b for a, b in zip(known, moments, strict=True))]
    front.append(moments)
    return True


def _wanted(program: Program) -> list[frozenset[int]]:
    """For every op what it and those behind read, and all that it can be made of."""
    found: list[frozenset[int]] = [frozenset()]
    for op in reversed(program.ops):
        new = set(op.reads)
        for i in range(len(program.ops) - 1, -1, -1):
            if new & set(program.ops[i].writes) and not program.ops[i].once:
                new.update(program.ops[i].reads)
        found.append(found[-1] | new)
    return found[::-1]


def _steps(
    program: Program, budget: int, state: State, wanted: frozenset[int]
) -> Iterator[tuple[float, State]]:  # fmt: skip
    leaving = {v for v, _ in state.leaving}
    free = [v for v in state.resident - leaving if program.hold[v] < state.following]
    useless = [v for v in free if v not in wanted]
    if useless:
        yield 0.0, state._replace(resident=state.resident.difference(useless))
        return
    for v in free:
        yield 0.0, state._replace(resident=state.resident - {v})
    yield from _moves(program, budget, state)
    yield from _runs(program, budget, state, wanted)


def _moves(program: Program, budget: int, state: State) -> Iterator[tuple[float, State]]:
    link = program.link
    assert link is not None
    assert link.takes_turns
    leaving = {v for v, _ in state.leaving}
    if not state.fetching:
        for v in state.resident - leaving:
            if program.hold[v] < state.following and program.values[v].nbytes:
                end = state.busy + link.out_seconds(program.values[v].nbytes)
                yield 0.0, state._replace(leaving=state.leaving | {(v, end)}, busy=end)
        for v, left in state.leaving:
            gone = state._replace(
                leaving=state.leaving - {(v, left)}, resident=state.resident - {v}, away=state.away | {v}
            )
            yield left, _later(gone, left)
    for v in state.away:
        if _bytes(program, state) + program.values[v].nbytes <= budget:
            end = state.busy + link.in_seconds(program.values[v].nbytes)
            coming = state.coming | {(v, end)}
            yield 0.0, state._replace(away=state.away - {v}, coming=coming, busy=end, fetching=True)
    for v, left in state.coming:
        here = state._replace(coming=state.coming - {(v, left)}, resident=state.resident | {v}, fetching=True)
        yield left, _later(here, left)


def _runs(
    program: Program, budget: int, state: State, wanted: frozenset[int]
) -> Iterator[tuple[float, State]]:  # fmt: skip
    elsewhere = state.away | {v for v, _ in state.coming}
    for i, op in enumerate(program.ops[: state.following + 1]):
        again = i < state.following
        if elsewhere & set(op.writes):
            continue
        if again and (op.once or state.resident.issuperset(op.writes) or wanted.isdisjoint(op.writes)):
            continue
        if not all(program.values[v].fixed or v in state.resident for v in op.reads):
            continue
        grown = sum(program.values[v].nbytes for v in op.writes)
        if _bytes(program, state) + grown + op.scratch_bytes <= budget:
            ran = state._replace(
                following=max(state.following, i + 1), resident=state.resident | set(op.writes), fetching=False
            )
            yield op.seconds if again else 0.0, _later(ran, op.seconds)


def _bytes(program: Program, state: State) -> int:
    there = [*state.resident, *(v for v, _ in state.coming)]
    return program.fixed_bytes + sum(program.values[v].nbytes for v in there)


def _later(state: State, seconds: float) -> State:
    """The same state after so many seconds."""
    if not seconds:
        return state

    def left(copies: Copies) -> Copies:
        return frozenset((v, max(0.0, s - seconds)) for v, s in copies)

    return state._replace(leaving=left(state.leaving), coming=left(state.coming), busy=max(0.0, state.busy - seconds))
