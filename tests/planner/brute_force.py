"""The cheapest schedule of all, for tiny programs: Dijkstra over what is in memory and what has run."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from autoremat.program import Op, Program

State = tuple[int, frozenset[int]]
"""How many ops have run for the first time, and what is in memory."""
Steps = Callable[[Program, int, State], Iterator[tuple[float, State]]]


def optimum(program: Program, budget_bytes: int) -> float | None:
    """Least extra seconds of any schedule within the budget, None when there is none. Exponential."""
    return cheapest(program, budget_bytes, _steps)


def cheapest(program: Program, budget_bytes: int, steps: Steps) -> float | None:
    """The same where these steps are possible, each with the extra seconds that it takes."""
    queue: list[tuple[float, int, State]] = [(0.0, 0, (0, frozenset()))]
    done: set[State] = set()
    count = 0
    while queue:
        seconds, _, state = heapq.heappop(queue)
        if state in done:
            continue
        done.add(state)
        if state[0] == len(program.ops):
            return seconds
        for cost, following in steps(program, budget_bytes, state):
            if following not in done:
                count += 1
                heapq.heappush(queue, (seconds + cost, count, following))
    return None


def _steps(program: Program, budget: int, state: State) -> Iterator[tuple[float, State]]:
    """Free one value, run the next op, or run an earlier one again."""
    following, resident = state
    for v in resident:
        if program.hold[v] < following:
            yield 0.0, (following, resident - {v})
    for i, op in enumerate(program.ops[: following + 1]):
        first = i == following
        if not first and op.once:
            continue
        if all(program.values[v].fixed or v in resident for v in op.reads):
            after = following + 1 if first else following
            for taken in _takeovers(op, first):
                if all(program.hold[old] < after for _, old in taken) and _fits(program, op, resident, taken, budget):
                    gone = {old for _, old in taken}
                    yield 0.0 if first else op.seconds, (after, (resident | set(op.writes)) - gone)


def _takeovers(op: Op, first: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The first run overwrites in place; a further run may work on a copy."""
    return (op.in_place,) if first or not op.in_place else (op.in_place, ())


def _fits(program: Program, op: Op, resident: frozenset[int], taken: tuple[tuple[int, int], ...], budget: int) -> bool:
    nbytes = [v.nbytes for v in program.values]
    during = program.fixed_bytes + op.scratch_bytes + sum(nbytes[v] for v in (*resident, *op.writes))
    return during - sum(min(nbytes[new], nbytes[old]) for new, old in taken) <= budget
