"""The cheapest schedule of all in which calls run again as prefixes, as ``brute_force`` for single ops."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from autoremat.program import Op, Program
from tests.planner.brute_force import State, cheapest


def optimum_by_calls(program: Program, budget_bytes: int) -> float | None:
    """Least extra seconds of any schedule within the budget, None when there is none. Exponential."""
    return cheapest(program, budget_bytes, _steps)


def _steps(program: Program, budget: int, state: State) -> Iterator[tuple[float, State]]:
    """Free one value, run the next op, or a prefix of an earlier call again."""
    following, resident = state
    for v in resident:
        if program.hold[v] < following:
            yield 0.0, (following, resident - {v})
    if following < len(program.ops):
        op = program.ops[following]
        if _readable(program, op, resident) and _bytes(program, op, resident, op.in_place, op.scratch_bytes) <= budget:
            gone = {old for _, old in op.in_place}
            yield 0.0, (following + 1, (resident | set(op.writes)) - gone)
    for begin in sorted({program.call_begin[i] for i in range(following)}):
        yield from _prefixes(program, budget, state, begin)


def _prefixes(program: Program, budget: int, state: State, begin: int) -> Iterator[tuple[float, State]]:
    """All prefixes of the call that begins there, with all that they could hand out and that could leave meanwhile."""
    following, resident = state
    end = begin
    while end < following and program.call_begin[end] == begin and not program.ops[end].once:
        prefix = range(begin, end + 1)
        ready = [v for i in prefix for v in program.ops[i].writes if program.available[v] <= end]
        read = {v for i in prefix for v in program.ops[i].reads}
        leaving = [v for v in sorted(resident & read) if program.hold[v] < following]
        seconds = sum(program.ops[i].again_seconds for i in prefix)
        for gone, out in product(_subsets(leaving), _subsets(ready)):
            if _fits(program, budget, resident, prefix, out, gone):
                yield seconds, (following, (resident - gone) | out)
        end += 1


def _subsets(values: list[int]) -> Iterator[frozenset[int]]:
    for bits in range(1 << len(values)):
        yield frozenset(v for k, v in enumerate(values) if bits >> k & 1)


def _fits(
    program: Program, budget: int, resident: frozenset[int], prefix: range, out: frozenset[int], gone: frozenset[int]
) -> bool:
    """Carry out the prefix: its values beside what is there, as long as the call holds them."""
    last = {v: max([program.producer[v], *(i for i in program.readers[v] if i in prefix)]) for v in gone}
    made = [v for i in prefix for v in program.ops[i].writes]
    last |= {v: max([program.producer[v], *(i for i in program.readers[v] if i in prefix)]) for v in made}
    last = {v: min(max(i, program.hold[v]), prefix[-1]) for v, i in last.items()}
    inside: list[int] = []
    outside = set(resident)
    for i in prefix:
        op = program.ops[i]
        if not all(program.values[v].fixed or v in outside or v in inside for v in op.reads):
            return False
        taken = tuple(
            (new, old)
            for new, old in op.in_place
            if last.get(old, -1) == i and (old in outside or old in inside) and old not in (out | (resident - gone))
        )
        there = sum(program.values[v].nbytes for v in (*outside, *inside))
        if there + _bytes(program, op, frozenset(), taken, op.again_scratch_bytes) > budget:
            return False
        inside += op.writes
        # What is there twice is counted twice until the end; what is handed out stays until then.
        inside = [v for v in inside if v in out or v in resident or last[v] > i]
        outside = {v for v in outside if v not in gone or last[v] > i}
    return True


def _readable(program: Program, op: Op, resident: frozenset[int]) -> bool:
    return all(program.values[v].fixed or v in resident for v in op.reads)


def _bytes(program: Program, op: Op, resident: frozenset[int], taken: tuple[tuple[int, int], ...], scratch: int) -> int:
    nbytes = [v.nbytes for v in program.values]
    during = program.fixed_bytes + scratch + sum(nbytes[v] for v in (*resident, *op.writes))
    return during - sum(min(nbytes[new], nbytes[old]) for new, old in taken)
