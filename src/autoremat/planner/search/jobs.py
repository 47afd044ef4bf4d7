"""Work that is done once per program, and counts again for every budget that it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoremat.planner import clock
from autoremat.planner.search.search import Entry, Search

Job = Callable[[float], None]
"""Finds candidates; is told a deadline."""


class Jobs:
    """What each job has found, as far as they have run.

    A job that has run before costs what it cost then (``clock.spend``), so that what is found for a budget does not
    depend on which others have been asked for before.

    Args:
        search: which remembers what jobs find.
        jobs: in the order in which they run.

    Attributes:
        are_free: those that have run cost nothing: several budgets share them.
    """

    def __init__(self, search: Search, jobs: Sequence[Job]) -> None:
        self._search, self._jobs = search, jobs
        self._found: dict[Job, tuple[list[Entry], float]] = {}
        self.are_free = False

    def run(self, deadline: float, enough: Callable[[], bool], told: Callable[[float], None]) -> None:
        """Run one after the other until there are enough candidates or until the deadline; tell the share done."""
        for k, job in enumerate(self._jobs):
            if enough() or (clock.is_over(deadline, closely=True) and not (self.are_free and job in self._found)):
                return
            told(k / len(self._jobs))
            self._run(job, deadline)

    def _run(self, job: Job, deadline: float) -> None:
        """Run a job, or take what it has found before from its record."""
        if job in self._found:
            entries, seconds = self._found[job]
            for entry in entries:
                self._search.remember(entry)
            clock.spend(0.0 if self.are_free else seconds)
            return
        begin, self._search.found = clock.worked(), []
        job(deadline)
        if not clock.has_cut():
            self._found[job] = self._search.found, clock.worked() - begin
        self._search.found = []  # what is found for one budget is not the pool's
