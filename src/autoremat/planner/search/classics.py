"""The classics as candidates of the search, so that no plan is worse than theirs.

``around`` one budget: the plans of Chen, Revolve, rotor and DTR are looked at, and the best of each that fits is filled
up by ``reuse``. ``find_floor``: Revolve with few slots, which on chains needs the least memory of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from autoremat.planner import clock
from autoremat.planner.search.chain import Chain, Runs, chain_of
from autoremat.planner.search.evict import course_of
from autoremat.planner.search.search import Search
from autoremat.planner.solvers.chen import chen_plans
from autoremat.planner.solvers.chen_recursive import chen_recursive_plans
from autoremat.planner.solvers.dtr import dtr_runs
from autoremat.planner.solvers.revolve import fewest_slots, revolve_plans, revolve_runs
from autoremat.planner.solvers.rotor import MOST_BLOCKS, rotor_plans

_CLASSICS_SECONDS = 0.05
"""What the dynamic programming of one of them counts as work, beside the looks at its plans."""


class Classics:
    """The classics' plans for one program; what they find is remembered by the search."""

    def __init__(self, search: Search) -> None:
        self._search = search

    @cached_property
    def _chain(self) -> Chain:
        return chain_of(self._search.tables)

    def find_floor(self) -> None:
        """Revolve with the fewest slots for which the schedule is not endless, and Chen's plans."""
        if self._search.tables.passing:
            return
        self._search.look("revolve", revolve_runs(self._chain, fewest_slots(len(self._chain))))
        for plans in (chen_plans(self._chain), chen_recursive_plans(self._chain)):
            for runs in plans:
                self._search.look("chen", runs)

    def around(self, budget_bytes: int, deadline: float) -> None:
        """Look at all plans for the budget; none where the user forbids to keep something, which they cannot obey."""
        if self._search.tables.passing:
            return
        for name, plans in self._plans(budget_bytes, deadline):
            clock.spend(_CLASSICS_SECONDS)
            looks = [(self._search.look(name, runs), runs) for runs in plans]
            fitting = [(look.rank, runs) for look, runs in looks if look.peak_bytes <= budget_bytes]
            if fitting:
                self._search.reuse(name, min(fitting)[1], budget_bytes)
            if clock.is_over(deadline):
                return

    def _plans(self, budget_bytes: int, deadline: float) -> Iterator[tuple[str, Iterable[Runs]]]:
        tables, accountant = self._search.tables, self._search.accountant
        yield "revolve", revolve_plans(self._chain, accountant, budget_bytes)
        yield "rotor", rotor_plans(chain_of(tables, MOST_BLOCKS), accountant, budget_bytes)
        yield "chen", chen_plans(self._chain)
        yield "chen-recursive", chen_recursive_plans(self._chain)
        runs = dtr_runs(course_of(tables), budget_bytes, deadline=deadline)
        yield "dtr", [runs] if runs is not None else []
