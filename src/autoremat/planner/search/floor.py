"""The floor: the smallest budget that is accepted. It depends on the bytes of a program and on nothing else.

Whoever plans a step, with whatever time, and from seconds that were estimated, or measured on a quiet or a busy
machine, has to come to the same one: else a budget that one of them promises, another one refuses. Therefore the lowest
peak is looked for on a program of which every op takes equally long, and whatever the time. What is looked at on the
way are candidates of the program itself, too: their bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from autoremat.planner import clock
from autoremat.planner.search.account import Ints
from autoremat.planner.search.calls import planned_as
from autoremat.planner.search.classics import Classics
from autoremat.planner.search.intervals import Intervals, is_open
from autoremat.planner.search.memo import per_program
from autoremat.planner.search.search import Candidate, Entry, Search
from autoremat.planner.search.tables import open_tables_of
from autoremat.planner.search.walks import Walks
from autoremat.planner.solvers.segments import boundaries, crossing
from autoremat.program import Program

_NESTED = (2, 3, 4, 6, 8, 12, 20, 32)
_SMALL = 100
"""Ops beyond which all else takes long and finds nothing lower than annealing, where any op may run again anywhere."""
_SHAVED = 3
"""How many of the lowest peaks are shaved as far down as it goes."""


@per_program
def floor_of(program: Program) -> Floor:
    """The floor of a program, looked for once and kept while the program lives."""
    return Floor(program)


class Floor:
    """Looks for the lowest peak of a program, as far as anybody asks.

    Args:
        program: whose.

    Attributes:
        is_done: nothing is left to look at.
    """

    def __init__(self, program: Program) -> None:
        # Kept: the search is about this program, and looks at it as long as it lives.
        self._even = replace(program, ops=tuple(replace(op, seconds=1.0, rerun_seconds=None) for op in program.ops))
        self._search = _Heard(self._even)
        self._work = self._steps()
        self.is_done = False

    def is_within(self, budget_bytes: int) -> bool:
        """Whether a budget is accepted. Looks no further than that takes."""
        while self.met_bytes > budget_bytes and self._look():
            pass
        return self.met_bytes <= budget_bytes

    @property
    def met_bytes(self) -> int:
        """The lowest peak so far: a budget that is accepted."""
        return self._search.frontier[0].peak_bytes if self._search.frontier else 1 << 62

    @property
    def nbytes(self) -> int:
        """The smallest budget that is accepted."""
        while self._look():
            pass
        return self.met_bytes

    def entries(
        self, extra_seconds_of: Callable[[Ints], float], will_do: Callable[[], bool] = lambda: False
    ) -> list[Entry]:
        """All that were looked at, one at least; the lowest peak first.

        Args:
            extra_seconds_of: what the reruns of an order take on the program itself.
            will_do: asked before each step whether what has been looked at so far will do.
        """
        while not (self._search.heard and will_do()) and self._look():
            pass
        found = [replace(entry, extra_seconds=extra_seconds_of(order)) for entry, order in self._search.heard]
        return sorted(found, key=lambda e: (e.peak_bytes, e.extra_seconds))

    def _look(self) -> bool:
        """Do one step of the work, whatever the time; False where all is done."""
        if not self.is_done:
            with clock.aside():
                self.is_done = not next(self._work, False)
        return not self.is_done

    def _steps(self) -> Iterator[bool]:
        """All the work, step by step; each is True."""
        search = self._search
        search.keeping("keep-everything", frozenset(search.tables.droppable))
        yield True
        search.keeping("keep-nothing", frozenset())
        yield True
        for counts in ((a, b, c) for a in _NESTED for b in (2, 3, 5) for c in (1, 3)):
            _nest(search, counts)
            yield True
        Classics(search).find_floor()
        yield True
        if is_open(self._even):
            yield from (True for _ in Intervals(search, self._even).lowering())
            if len(self._even.ops) > _SMALL:
                return
        for entry in search.leveled[:_SHAVED]:
            search.shave(search.recall(entry), 0, rounds=40)
            yield True
        everywhere = open_tables_of(planned_as(self._even))
        for tables in [search.tables] if everywhere is None else [search.tables, everywhere]:
            Walks(search, tables).find_floor()
            yield True


class _Heard(Search):
    """A search that keeps every candidate, and its order of runs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.heard: list[tuple[Entry, Ints]] = []

    def note(self, candidate: Candidate) -> None:
        """Take note of a candidate."""
        super().note(candidate)
        self.heard.append((candidate.entry, candidate.account.order))


def _nest(search: Search, counts: tuple[int, ...]) -> None:
    """Segments within segments, for small budgets."""
    tables, keeps, count = search.tables, list[frozenset[int]](), 1
    for factor in counts:
        count *= factor
        if factor > 1 and count <= len(tables.early):
            keeps.append(crossing(tables, boundaries(tables, count, tapered=not keeps)))
    if keeps:
        search.keeping("nested segments", *keeps)
