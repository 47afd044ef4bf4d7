"""Merges plans: the cheapest set of further runs among all those of several plans, by an integer program.

Annealing ends in another valley each time, and each of its plans has parts that are better than those of the others.
Together they have a few hundred further runs. Which of these to take is a small integer program, with a column for each
of them; what stays from one use of a value to the next follows. Its optimum is at least as good as the best of the
plans, and mostly much better than one search that takes as long (Blum et al. 2016, "Construct, Merge, Solve & Adapt",
after it and after what integer programming calls RINS, Danna et al. 2005).

The bytes at every run are rows, as ``retention`` counts them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Final

from autoremat.planner.bounds.stages import ONE, ZERO, Floats, Table
from autoremat.planner.search.retention import Retention, Runs
from autoremat.program import Program

NODES: Final = 300
"""Of the search, at most."""

_ROOT_SECONDS, _NODE_SECONDS = 4e-5, 8e-7
"""What an entry of the matrix counts as work, at the first node of the search and at each further one."""

_BETTER: Final = 1e-6
"""By what share a merged plan has to be cheaper than what is known."""

_UNIT: Final = 1e4
"""The cost of the whole program, so that the tolerances of the solver are far below what counts."""


def merged(program: Program, plain: Retention, plans: Sequence[Runs], below: float, seconds: float) -> Runs | None:
    """The cheapest further runs among those of the plans; None where none are known to be cheaper than ``below``.

    Args:
        program: one all of whose ops may run again anywhere.
        plain: its retention, with the budget and without further runs.
        plans: sets of further runs, the best first. The last ones are left out where not all fit into the work.
        below: seconds of further runs.
        seconds: of work.
    """
    for count in range(len(plans), 1, -1):
        model = _Model(program, plain, {late * plain.n + i for runs in plans[:count] for late, i in runs})
        entries = model.built(below).entries
        if _ROOT_SECONDS * entries <= seconds:
            found = model.table.solve(seconds, nodes=NODES, each=(_ROOT_SECONDS, _NODE_SECONDS))
            return None if found.point is None else model.chosen(found.point)
    return None


class _Model:
    """The integer program of one set of further runs.

    Args:
        program: the step.
        plain: its retention without further runs, and the budget.
        keys: of the further runs to choose from.

    Attributes:
        table: the integer program.
    """

    def __init__(self, program: Program, plain: Retention, keys: Iterable[int]) -> None:
        self.table = Table()
        self._program, self._plain, self._n = program, plain, plain.n
        self._unit = _UNIT / program.seconds
        seconds = plain.facts.seconds
        self._column = {key: self.table.column(seconds[key % plain.n] * self._unit) for key in sorted(keys)}
        self._runs = sorted([*plain.keys, *self._column])
        self._bytes: list[list[tuple[float, int]]] = [
            [(float(plain.facts.own_bytes(key)), self._column.get(key, ONE))] for key in self._runs
        ]

    def built(self, below: float) -> Table:
        """The integer program, of all that costs less than so many seconds."""
        self._stay()
        self._fit()
        costs = [(self.table.cost[x], x) for x in self._column.values()]
        most = below * (1 - _BETTER) * self._unit
        if sum(cost for cost, _ in costs) > most:
            self.table.row(costs, most)
        return self.table

    def chosen(self, point: Floats) -> Runs:
        """The further runs of a point."""
        return [divmod(key, self._n) for key, x in self._column.items() if point[x] > 0.5]

    def _stay(self) -> None:
        """Columns for what stays from one use to the next, where it does not have to; rows for where it comes from."""
        facts, uses = self._plain.facts, [set(found) for found in self._plain.accesses]
        for key in self._column:
            for v in (*facts.reads[key % self._n], *facts.writes[key % self._n]):
                uses[v].add(key)
        for v, found in enumerate(uses):
            if found:
                self._stays(v, sorted(found))

    def _stays(self, v: int, uses: list[int]) -> None:
        held, before = self._program.hold[v] * (self._n + 1), ONE
        for k in range(len(uses) - 1):
            here, there = uses[k], uses[k + 1]
            makes = self._column[here] if self._makes(here, v) and here in self._column else ZERO
            is_read = not self._makes(there, v)
            must = there <= held or (is_read and there not in self._column)
            stays = ONE if must else self.table.column(whole=False)
            if k:
                self.table.below(stays, before, makes)
            if is_read and there in self._column:
                self.table.below(self._column[there], stays)
            for x in range(bisect_left(self._runs, here) + 1, bisect_left(self._runs, there) + 1):
                self._bytes[x].append((float(self._plain.facts.nbytes[v]), stays))
            before = stays

    def _makes(self, key: int, v: int) -> bool:
        return key % self._n == self._plain.facts.producer[v]

    def _fit(self) -> None:
        """A row for every run at which not all that might stay has room."""
        budget = self._plain.budget_bytes - self._program.fixed_bytes
        for terms in self._bytes:
            free = budget - sum(nbytes for nbytes, x in terms if x == ONE)
            optional = [(nbytes, x) for nbytes, x in terms if x != ONE]
            if sum(nbytes for nbytes, _ in optional) > free:
                unit = max(1.0, budget / 1e4)
                self.table.row([(nbytes / unit, x) for nbytes, x in optional], free / unit)
