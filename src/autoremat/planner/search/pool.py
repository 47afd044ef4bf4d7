"""The candidates of one program that do not depend on a budget, and the search from them for one that does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf

from autoremat.planner import clock
from autoremat.planner.bounds.bounds import closer_bound, cut_bound
from autoremat.planner.search.calls import folded_of, planned_as
from autoremat.planner.search.carried import carried_over
from autoremat.planner.search.classics import Classics
from autoremat.planner.search.floor import floor_of
from autoremat.planner.search.greed import greedy
from autoremat.planner.search.intervals import Intervals, is_open
from autoremat.planner.search.jobs import Job, Jobs
from autoremat.planner.search.min_cut import Pricer
from autoremat.planner.search.search import Candidate, Entry, Search, no_noise
from autoremat.planner.search.tables import Tables, open_tables_of
from autoremat.planner.search.walks import Walks
from autoremat.planner.solvers.every_block import block_of
from autoremat.planner.solvers.segments import boundaries
from autoremat.program import Plan, Program, Schedule, simulate

_SMALL_PROGRAM = 200
_LARGE_PROGRAM = 6000
_WALKS_FIRST = 500
"""Programs with more ops are walked before what is much above the budget is shaved: that takes longer by then."""
_NEAR_ENOUGH = 0.0005
_FAR = 0.1
"""The gap beyond which annealing goes on."""
_INTERVALS_SHARE, _BOUND_SHARE = 0.6, 0.35
"""Of the work, where any op may run again anywhere: for annealing, and for the bound in the end."""
_CLOSE = 0.0025
"""The gap beyond which a closer look at the bound is worth its time."""
_RUNGS = 16
_SEED = 20160421
_MISSES = 8
"""After how many walks without success the rest of the disturbances is left to shave and fill."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search: ``schedule`` is None when nothing fits; then ``lowest`` has the smallest known peak."""

    name: str
    schedule: Schedule | None
    lowest: Schedule | None
    floor_bytes: int
    lower_bound: float
    candidates: tuple[tuple[str, int, float], ...]
    steps: int = 0


class Pool:
    """Candidates of one program, made once; ``solve`` then starts from them for each budget.

    The program itself is handed to the methods, because the pool must not keep it alive.
    """

    def __init__(self, program: Program) -> None:
        self._search = Search(program)
        open_tables = open_tables_of(planned_as(program))
        self._walks = [Walks(self._search, t) for t in (self._search.tables, open_tables) if t is not None]
        self._classics = Classics(self._search)
        self._floor = floor_of(program)
        self._from_the_floor: list[Entry] = []
        """What was looked at to find it; the lowest peak first."""
        self._jobs = Jobs(self._search, [*self._cut_work(), *self._rest_of_the_work()])
        self._intervals = Intervals(self._search, program) if is_open(program) else None
        self._base: tuple[Entry, ...] = ()

    # -- the pool ------------------------------------------------------------------------------------------------------

    def grow(self, deadline: float, progress: Callable[[str, float], None], enough: Callable[[], bool]) -> None:
        """Make candidates until there are enough, or until the deadline.

        Starts from nothing each time and takes what a job found before from its record; so the pool is the same
        whichever budgets have been asked for before.
        """
        self._restart()
        self._jobs.run(deadline, enough, lambda share: progress("pool of candidates", 0.6 * share))
        self._base = tuple(self._search.frontier)

    def _restart(self) -> None:
        """Forget all candidates but those that were looked at to find the floor, so that one is always known."""
        self._search.frontier, self._search.leveled = [], []
        for entry in self._look_for_the_floor():
            self._search.remember(entry)

    @contextmanager
    def shared(self, limit: float, progress: Callable[[str, float], None]) -> Iterator[None]:
        """Make candidates for so long which cost the budgets that are asked for meanwhile nothing more."""
        self._jobs.are_free = True
        try:
            with clock.limited(limit):
                self.grow(clock.worked() + limit, progress, lambda: False)
            yield
        finally:
            self._jobs.are_free = False

    def _look_for_the_floor(self) -> list[Entry]:
        """What was looked at; where time is over, no more than it took to know that the budget is accepted."""
        if not (self._floor.is_done and self._from_the_floor):
            self._from_the_floor = self._floor.entries(self._search.accountant.extra_seconds_of, clock.is_over)
        return self._from_the_floor

    def _cut_work(self) -> Iterator[Job]:
        """Minimum cuts for a grid of prices and segmentations."""
        pricer, cuts = Pricer(self._search.tables), self._segmentations()
        prices = pricer.prices(3 if len(self._search.tables.ops) > _LARGE_PROGRAM else 6)
        for price in prices:
            for cut in cuts:
                yield self._priced(pricer, price, cut)

    def _rest_of_the_work(self) -> Iterator[Job]:
        """Walks between floor and plain peak, and for small programs a ladder of budgets."""
        for walks in self._walks:
            yield from walks.ladder()
        if len(self._search.tables.ops) <= _SMALL_PROGRAM:
            yield from (self._rung(k) for k in range(_RUNGS))

    def _segmentations(self) -> list[tuple[int, ...]]:
        """Cuts from one segment to one per op, about twelve counts, with equal and with shrinking segments."""
        tables = self._search.tables
        found: dict[tuple[int, ...], None] = {(): None, _block_cuts(tables): None}
        count = 2.0
        ratio = max(1.3, (len(tables.early) / 2) ** (1 / 11)) if len(tables.early) > 2 else 2.0
        while count <= len(tables.early):
            for tapered in (False, True):
                found[boundaries(tables, round(count), tapered=tapered)] = None
            count *= ratio
        return list(found)

    def _priced(self, pricer: Pricer, price: float, cuts: tuple[int, ...]) -> Job:
        return lambda deadline: _ignore(self._search.keeping("min-cut", pricer.keep(price, cuts)))

    def _rung(self, k: int) -> Job:
        """A fixed smaller budget: small programs solve a ladder of them, so that more budget does not cost more."""

        def climb(deadline: float) -> None:
            low, high = self._search.frontier[0].peak_bytes, self._search.frontier[-1].peak_bytes
            self._improve(low + (high - low) * k // _RUNGS, deadline, disturbances=4)

        return climb

    # -- one budget ----------------------------------------------------------------------------------------------------

    def solve(
        self, program: Program, budget_bytes: int, solver: str, limit: float, progress: Callable[[str, float], None]
    ) -> Found:
        """The best candidate for the budget.

        Below the floor ``auto`` looks for nothing: what it would find depends on how long it looks, and on seconds.
        """
        bound, moments, steps = 0.0, list[int](), 0
        progress("floor", 0.0)
        if solver == "auto" and not self._floor.is_within(budget_bytes):
            floor = self._look_for_the_floor()[0]
            return Found("", None, self._schedule(program, floor), floor.peak_bytes, 0.0, ())
        begin = clock.worked()
        self._search.frontier, self._search.leveled = [], []
        greedy_one = greedy(self._search, budget_bytes, deadline=begin + 0.7 * limit)  # first: time may be over soon
        early = self._search.leveled
        if budget_bytes < simulate(program).peak_bytes:
            progress("lower bound", 0.0)
            bound, moments = cut_bound(program, budget_bytes, deadline=begin + 0.2 * limit)
        bound = max(bound, self._search.tables.asked_seconds(program) / (program.seconds or 1.0))
        enough = (bound + self._near_enough) * program.seconds

        def done() -> bool:
            return self._is_down_to(enough, budget_bytes)

        if solver == "auto" and self._intervals:
            progress("annealing", 0.0)
            self._search.frontier, self._search.leveled = [], []
            far = (bound + _FAR) * program.seconds
            known = greedy_one.extra_seconds if greedy_one.peak_bytes <= budget_bytes else inf
            work, end = _INTERVALS_SHARE * limit, begin + 0.7 * limit
            steps = self._intervals.around(program, budget_bytes, work, done, far, end, known)
            early = [*early, *self._search.frontier]
        self.grow(begin + 0.6 * limit, progress, (lambda: True) if steps and done() else done)
        for entry in early:
            self._search.remember(entry)
        floor = self._look_for_the_floor()[0]
        if solver == "auto":
            progress("search", 0.7)
            share = 1.0 - _BOUND_SHARE if self._intervals else 0.9
            self._improve(budget_bytes, begin + share * limit, self._disturbances(), enough)
        elif greedy_one.peak_bytes > budget_bytes:
            # Shaving towards another peak takes another way. So the greedy's floor, which is what it can do at most, is
            # the same for all budgets, and within reach.
            greedy_one = greedy(self._search, 0)
            floor = greedy_one.entry
        best = self._choose(budget_bytes, solver, greedy_one)
        if (
            best and program.has_calls and solver == "auto"
        ):  # what a call has made on the way may stay until it is asked for
            self._search.reuse(best.name, list(self._search.recall(best).runs), budget_bytes)
            best = self._choose(budget_bytes, solver, greedy_one)
        if best and best.extra_seconds > (bound + _CLOSE) * program.seconds:
            progress("closer bound", 0.95)
            bound = max(bound, closer_bound(program, budget_bytes, moments, deadline=begin + limit))
        progress("done", 1.0)
        return Found(
            best.name if best else "",
            self._schedule(program, best) if best else None,
            self._schedule(program, floor) if best is None else None,
            floor.peak_bytes,
            bound if best and best.extra_seconds > 0 else 0.0,
            self._report(program, budget_bytes, greedy_one),
            steps,
        )

    def _choose(self, budget_bytes: int, solver: str, greedy_one: Candidate) -> Entry | None:
        if solver == "greedy":
            return greedy_one.entry if greedy_one.peak_bytes <= budget_bytes else None
        return self._search.best_within(budget_bytes)

    def _report(self, program: Program, budget_bytes: int, greedy_one: Candidate) -> tuple[tuple[str, int, float], ...]:
        """The greedy and the best of every algorithm of the pool that fits."""
        rows: dict[str, tuple[int, float]] = {}
        for entry in (greedy_one.entry, *self._base):
            counts = entry.peak_bytes <= budget_bytes or entry.name == "greedy"
            if counts and entry.extra_seconds < rows.get(entry.name, (0, inf))[1]:
                rows[entry.name] = (entry.peak_bytes, entry.extra_seconds)
        total = program.seconds or 1.0
        return tuple((name, peak, seconds / total) for name, (peak, seconds) in rows.items())

    def _schedule(self, program: Program, entry: Entry) -> Schedule:
        return _schedule_of(program, self._search.recall(entry))

    def _is_down_to(self, seconds: float, budget_bytes: int) -> bool:
        best = self._search.best_within(budget_bytes)
        return best is not None and best.extra_seconds <= seconds

    @property
    def _near_enough(self) -> float:
        """The gap to the lower bound at which to stop; small programs go on, so that the laws hold exactly."""
        return 0.0 if len(self._search.tables.ops) <= _SMALL_PROGRAM else _NEAR_ENOUGH

    def _improve(self, budget_bytes: int, deadline: float, disturbances: int, enough: float = 0.0) -> None:
        """Fill the best that fits, shave and fill what is above, walk; then disturb the best again and again.

        What is much above the budget takes long on a large program: there it comes after the walks. Stops early where
        the extra seconds are down to ``enough``.
        """
        search = self._search

        def done() -> bool:
            return clock.is_over(deadline) or self._is_down_to(enough, budget_bytes)

        near, far = (self._fitting(starts, done) for starts in self._starts(budget_bytes))
        around = [walks.around for walks in self._walks]
        late = [*around, far] if len(search.tables.ops) > _WALKS_FIRST else [far, *around]
        for attempt in (near, *late, self._classics.around):
            if done():
                return
            attempt(budget_bytes, deadline)
        dice, misses = random.Random(_SEED), 0
        for k in range(disturbances):
            best = search.best_within(budget_bytes)
            if best is None or done():
                return
            if k % 2 and misses < _MISSES:
                self._walks[k // 2 % len(self._walks)].disturb(best, budget_bytes, dice)
                misses = misses + 1 if search.best_within(budget_bytes) is best else 0
            self._disturb(best, budget_bytes, dice, deadline)

    def _disturbances(self) -> int:
        """How often to disturb: about as much work for large programs as for small ones."""
        return max(6, min(60, len(self._search.tables.droppable), 60_000 // max(1, len(self._search.tables.ops))))

    def _disturb(self, best: Entry, budget_bytes: int, dice: random.Random, deadline: float) -> None:
        """Large-neighbourhood search, one step: shave below the budget with noisy scores, then fill."""
        levels = self._search.leveled
        above = [e for e in levels if e.peak_bytes > budget_bytes][:12]
        below = best if best.runs is None else next((e for e in reversed(levels) if e.peak_bytes <= budget_bytes), best)
        start = dice.choice(above) if above and dice.random() < 0.3 else below
        spread, share = dice.choice((0.0, 0.1, 0.3, 0.6, 1.0)), dice.choice((0.99, 0.97, 0.94, 0.9, 0.8))
        self._search.noise = lambda: exp(dice.gauss(0, spread))
        try:
            self._fit(self._search.recall(start), int(share * budget_bytes), budget_bytes, deadline)
        finally:
            self._search.noise = no_noise

    def _fitting(self, starts: list[Entry], done: Callable[[], bool]) -> Callable[[int, float], None]:
        """Fit one after the other into a budget, until it is done."""

        def fit(budget_bytes: int, deadline: float) -> None:
            for entry in starts:
                if done():
                    return
                self._fit(self._search.recall(entry), budget_bytes, budget_bytes, deadline)

        return fit

    def _starts(self, budget_bytes: int) -> tuple[list[Entry], list[Entry]]:
        """The best that fit and some that do not, a little above the budget; and others that are much above."""
        leveled = self._search.leveled
        fit = [e for e in leveled if e.peak_bytes <= budget_bytes]
        above = [e for e in leveled if e.peak_bytes > budget_bytes]
        ranks = dict.fromkeys((*(len(above) * k // 8 for k in range(1, 8)), len(above) - 1))
        return fit[-2:] + above[:4], [above[k] for k in ranks if 3 < k < len(above)]

    def _fit(self, candidate: Candidate, target_bytes: int, budget_bytes: int, deadline: float) -> None:
        shaved = self._search.shave(candidate, target_bytes, deadline=deadline)
        if shaved.peak_bytes <= budget_bytes:
            self._search.fill(shaved, budget_bytes, deadline=deadline)


def _block_cuts(tables: Tables) -> tuple[int, ...]:
    blocks = block_of(tables)
    return tuple(b for a, b in pairwise(tables.early) if blocks[a] != blocks[b])


def found_at_once(program: Program, budget_bytes: int, near: Plan | None = None) -> Found | None:
    """What the greedy makes of a budget, or what is carried over from the plan of a similar program.

    None where neither gets there.
    """
    search = Search(program)
    starts = [greedy(search, budget_bytes)]
    if near is not None:
        starts += carried_over(search, program, near, budget_bytes)
    found = [c if c.walked else search.fill(c, budget_bytes) for c in starts if c.peak_bytes <= budget_bytes]
    if program.has_calls:
        found += [search.reuse(c.name, c.runs, budget_bytes) for c in found if not c.walked]
    found = sorted((c for c in found if c.peak_bytes <= budget_bytes), key=lambda c: c.rank)
    if not found:
        return None
    best = found[0]
    total, peak, extra = program.seconds or 1.0, best.peak_bytes, best.extra_seconds
    bound = search.tables.asked_seconds(program) / total if extra > 0 else 0.0
    rows = {c.name: (c.name, c.peak_bytes, c.extra_seconds / total) for c in reversed(found)}
    return Found(best.name, _schedule_of(program, best), None, peak, bound, tuple(rows.values()))


def _schedule_of(program: Program, candidate: Candidate) -> Schedule:
    order = candidate.account.order.tolist()
    return Schedule.from_order(program, folded_of(program).unfold(order) if program.has_calls else order)


def _ignore(_: Candidate) -> None:
    """The search has remembered it."""
