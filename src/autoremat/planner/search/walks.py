"""Which walks of the evicting executor to try: for the floor, for a ladder of limits, around one budget.

Every walk is followed by ``reuse``, which takes back what the room below the budget makes superfluous. Walks start with
no opinion on what the forward keeps, or with that of another candidate: a minimum cut for a larger budget, say, whose
backward does not fit without nesting.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from math import exp

from autoremat.planner import clock
from autoremat.planner.search.evict import Course, Rules, course_of, evicting
from autoremat.planner.search.search import Candidate, Entry, Search, no_noise
from autoremat.planner.search.tables import Tables

_NAME = "evicting"
_WORK = 500
"""Programs with more ops get fewer walks, and a floor that may be one percent too high."""
_RUNGS = 8
_POWERS = (0.0, 0.5, 1.0)
_MOST_SCORES = 50_000
"""Of a walk that looks for the floor, which has no limit of time."""


class Walks:
    """The walks of one program; what they find is remembered by the search."""

    def __init__(self, search: Search, tables: Tables) -> None:
        self._search, self._tables = search, tables

    @cached_property
    def _course(self) -> Course:
        return course_of(self._tables)

    def find_floor(self) -> None:
        """Bisect for the lowest limit that a walk can keep to. The number of walks depends on the program alone."""
        low, tries = self._unavoidable_bytes(), self._tries(12)
        slack = 0.01 if len(self._tables.ops) > _WORK else 0.0
        for _ in range(tries if tries > 1 else 0):  # one walk alone finds nothing and takes long on such a program
            high = self._search.frontier[0].peak_bytes
            if low >= high - slack * high:
                return
            limit = (low + high) // 2
            rules = [Rules(limit, limit, power, most_scores=_MOST_SCORES) for power in _POWERS[: self._tries(2)]]
            if not any(self._walk(rule, limit) for rule in rules):
                low = limit + 1

    def _unavoidable_bytes(self) -> int:
        """Bytes below which no schedule can be: of some op, with what it reads and what no plan can drop."""
        course, tables = self._course, self._tables
        droppable = frozenset(tables.droppable)
        return max(
            (
                nbytes + sum(tables.values[v].nbytes for v in tables.reads[t] if v in droppable and t > tables.until[v])
                for t, nbytes in enumerate(course.during)
            ),
            default=0,
        )

    def ladder(self) -> Iterator[Callable[[float], None]]:
        """Jobs that walk under limits from the floor to the plain peak, closer together towards the floor."""
        yield from (self._rung((k / _RUNGS) ** 2) for k in range(1, self._tries(_RUNGS)))

    def _rung(self, share: float) -> Callable[[float], None]:
        def climb(deadline: float) -> None:
            frontier = self._search.frontier
            limit = frontier[0].peak_bytes + int(share * (frontier[-1].peak_bytes - frontier[0].peak_bytes))
            for power in _POWERS[:2]:
                self._walk(Rules(limit, limit, power), limit)

        return climb

    def around(self, budget_bytes: int, deadline: float) -> None:
        """Walk under the budget, from nothing and from what candidates above the budget drop."""
        for rules in self._rules(budget_bytes):
            if clock.is_over(deadline):
                return
            self._walk(rules, budget_bytes)
        best = next((e for e in reversed(self._search.leveled) if e.peak_bytes <= budget_bytes), None)
        if best:
            self._search.reuse(best.name, self._search.recall(best).runs, budget_bytes, self._tables)

    def _rules(self, budget_bytes: int) -> Iterator[Rules]:
        tries = self._tries(16)
        above = [e for e in self._search.leveled if e.peak_bytes > budget_bytes]
        ranks = dict.fromkeys((0, 2, len(above) // 8, len(above) // 4, len(above) // 2, 1, 3))
        starts = [frozenset[int](), *(above[k].dropped[0] for k in ranks if k < len(above))]
        pairs = [(dropped, power) for dropped in starts for power in _POWERS[: 2 if dropped else 3]]
        for dropped, power in pairs[:tries]:
            yield Rules(budget_bytes, budget_bytes, power, dropped)

    def disturb(self, best: Entry, budget_bytes: int, dice: random.Random) -> None:
        """Walk once more from what the best drops in the forward, less some of it, with noisy scores."""
        spread, share = dice.choice((0.0, 0.1, 0.3, 0.6)), dice.choice((0.0, 0.02, 0.05, 0.1, 0.3))
        limit = int(budget_bytes * dice.choice((1.0, 1.0, 0.99, 0.97, 0.94, 0.9)))
        dropped = frozenset(v for v in sorted(self._gone(self._search.recall(best))) if dice.random() >= share)
        self._search.noise = lambda: exp(dice.gauss(0, spread))
        try:
            rules = Rules(limit, limit, dice.choice((0.0, 0.25, 0.5, 1.0)), dropped, noise=self._search.noise)
            self._walk(rules, budget_bytes)
        finally:
            self._search.noise = no_noise

    def _gone(self, candidate: Candidate) -> frozenset[int]:
        """The values that a candidate drops from the forward."""
        if candidate.dropped:
            return candidate.dropped[0]
        tables, account = self._tables, candidate.account
        first_end: dict[int, int] = {}
        for v, end in zip(account.value.tolist(), account.end.tolist(), strict=True):
            first_end.setdefault(v, end)
        return frozenset(v for v in tables.droppable if account.progress[first_end[v]] <= tables.until[v])

    def _walk(self, rules: Rules, budget_bytes: int) -> Candidate | None:
        """One walk and what ``reuse`` makes of it; None when it does not fit into ``budget_bytes``."""
        dropped = rules.dropped | self._tables.passing
        runs = evicting(self._course, replace(rules, dropped=dropped, most_bytes=budget_bytes))
        if runs is None:
            return None
        return self._search.reuse(_NAME, runs, budget_bytes, self._tables)

    def _tries(self, most: int) -> int:
        """How many walks to spend: fewer on large programs."""
        return max(1, min(most, most * _WORK // max(1, len(self._tables.ops))))
