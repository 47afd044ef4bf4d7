"""The cheapest of all schedules of a tiny program: Dijkstra's algorithm (1959) over what has run and what is in memory.

The exact solver for programs of a few dozen ops (``exact``) looks at schedules that run an op at most once more between
two first runs, in program order. On rare graphs a cheaper schedule breaks that rule; of a dozen ops all can be looked
at.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from autoremat.program import Program, Schedule, simulate

MOST_OPS: Final = 12
"""Ops beyond which there are too many states."""

_State = tuple[int, int]
"""The next op of the program, and the values in memory as bits of an integer."""


def cheapest(program: Program, budget_bytes: int) -> Schedule | None:
    """The schedule with the fewest extra seconds of all within the budget; None when none fits.

    O(ops * 2^values * (ops + values)); milliseconds for ten ops.
    """
    search = _Search(program, budget_bytes)
    start: _State = (0, 0)
    best: dict[_State, float] = {start: 0.0}
    came: dict[_State, tuple[_State, int]] = {}
    queue: list[tuple[float, _State]] = [(0.0, start)]
    while queue:
        seconds, state = heapq.heappop(queue)
        if state[0] == len(program.ops):
            return _checked(program, _order(came, state), budget_bytes)
        if seconds > best[state]:
            continue
        for cost, op, following in search.moves(state):
            if seconds + cost < best.get(following, float("inf")):
                best[following], came[following] = seconds + cost, (state, op)
                heapq.heappush(queue, (seconds + cost, following))
    return None


def _order(came: dict[_State, tuple[_State, int]], state: _State) -> list[int]:
    """The ops on the way to a state."""
    order: list[int] = []
    while state in came:
        state, op = came[state]
        if op >= 0:
            order.append(op)
    return order[::-1]


def _checked(program: Program, order: list[int], budget_bytes: int) -> Schedule | None:
    schedule = Schedule.from_order(program, order)
    return schedule if simulate(program, schedule).peak_bytes <= budget_bytes else None


@dataclass(frozen=True)
class _Search:
    """The moves of one program under one budget."""

    program: Program
    budget_bytes: int

    def moves(self, state: _State) -> Iterator[tuple[float, int, _State]]:
        """Seconds, op (-1 for a free) and the state that follows."""
        following, resident = state
        for v in range(len(self.program.values)):
            if resident >> v & 1 and self.program.hold[v] < following:
                yield 0.0, -1, (following, resident & ~(1 << v))
        for i in range(following + 1):
            op = self.program.ops[i]
            again = i < following
            if (again and op.once) or not self._reads_are_there(i, resident):
                continue
            after, taken = max(following, i + 1), self._taken(i, max(following, i + 1))
            for gone in {0, taken}:
                grown = resident | _bits(op.writes)
                if self._bytes(i, resident, gone, again=again) <= self.budget_bytes:
                    yield op.again_seconds if again else 0.0, i, (after, grown & ~gone)

    def _reads_are_there(self, i: int, resident: int) -> bool:
        return all(self.program.values[v].fixed or resident >> v & 1 for v in self.program.ops[i].reads)

    def _taken(self, i: int, after: int) -> int:
        """The values whose storage an in-place op may take over: all of them, or none."""
        old = [old for _, old in self.program.ops[i].in_place]
        return _bits(old) if all(self.program.hold[v] < after for v in old) else 0

    def _bytes(self, i: int, resident: int, gone: int, *, again: bool) -> int:
        """Bytes while op ``i`` runs; what it writes a second time is there twice, as ``simulate`` says."""
        values, op = self.program.values, self.program.ops[i]
        scratch = op.again_scratch_bytes if again else op.scratch_bytes
        total = self.program.fixed_bytes + scratch + sum(values[v].nbytes for v in op.writes)
        total += sum(x.nbytes for v, x in enumerate(values) if resident >> v & 1)
        pairs = [(new, old) for new, old in op.in_place if gone >> old & 1]
        return total - sum(min(values[new].nbytes, values[old].nbytes) for new, old in pairs)


def _bits(values: list[int] | tuple[int, ...]) -> int:
    return sum(1 << v for v in set(values))
