"""Annealing of retention intervals as a part of the search: how often, from where, for the floor and for a budget.

Only where any op may run again anywhere: there nothing tells forward from backward, values leave and come back all
along the program, and what keeps or drops values once (``shave``, ``fill``, cuts) has little to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from autoremat.planner import clock
from autoremat.planner.bounds.bounds import floor_bound
from autoremat.planner.search.annealing import STEPS_A_SECOND, Annealed, Annealing, Course
from autoremat.planner.search.merging import merged
from autoremat.planner.search.retention import Retention, Runs
from autoremat.planner.search.search import Search
from autoremat.program import Program

_NAME, _MERGED = "annealing", "merging"

_SQUARE_STEPS = 5
"""Steps for each pair of ops that count as much as a second of work at least: small programs need no more."""

_MERGING_SHARE = 0.4
"""Of the work, at least: for merging what the searches have found."""

_FIRST_SHARE = 1 / 12
"""Of the work: for a first search, whose result is known soon."""

_START_STEPS = 60
"""Of a search, for each op, at least."""

_MOST_STARTS = 8
"""Of searches, at most; where the best stays far from the bound, up to so many in any case."""

_HOT, _COLD = Course(0, hot=4.0, cold=0.1, above=0.03), Course(0)
"""How searches cool down in turn: small programs have a few large values to get right, large ones many small ones."""

_REHEATED, _ROUNDS, _REHEATS, _LESS, _AGAIN = 400, 2, 4, 0.1, Course(0, hot=0.2, above=0.05)
"""Ops from which on the best is annealed again, how often, in how many ways each time; by how much more work merging
is then, for each round; how it cools down. Each way spoils some parts of a large plan and improves others, and merging
takes the best of each."""

_PAIR_SECONDS = 8e-6
"""The work of merging, for each pair of ops, below which there is no again: as much as one look takes."""

_FLOOR_STEPS, _MOST_FLOOR_STEPS = 200, 80_000
"""Of looking for the floor, for each op and in all; for one budget an eighth of that."""

_LAST_STEP = 0.002
"""The share of the plain peak below which lowering a peak further is not tried."""


def is_open(program: Program) -> bool:
    """Whether any op that may run again at all may do so anywhere, as often as one likes."""
    free = program.abilities.reruns == "anywhere" and not program.abilities.are_limited
    return free and not program.has_calls and not program.passing and program.seconds > 0


class Intervals:
    """The annealing of one program; what it finds is remembered by the search.

    Args:
        search: of the program.
        program: one that ``is_open``.
    """

    def __init__(self, search: Search, program: Program) -> None:
        self._search = search
        self._plain = Retention(program)
        self._least = floor_bound(program)

    def around(
        self, program: Program, budget_bytes: int, work: float, done: Callable[[], bool], far_seconds: float,
        deadline: float, known_seconds: float,
    ) -> int:  # fmt: skip
        """Search within a budget for so much work, up to the deadline while the best takes longer than ``far_seconds``.

        One long search more after two starts if what was found takes longer than ``known_seconds``, which another
        search has found with next to no work: there many short ones come to nothing.

        Returns the number of steps.
        """
        n, rounds = self._plain.n, 0
        merging = _MERGING_SHARE * work
        if n > _REHEATED:
            each = merging * (1 + _LESS * _ROUNDS) / (1 + _ROUNDS)
            if each >= _PAIR_SECONDS * n * n:
                rounds, merging = _ROUNDS, each
        most = int((work - (1 + rounds) * merging) * min(STEPS_A_SECOND, _SQUARE_STEPS * n * n))
        starts = _REHEATS if rounds else max(2, min(_MOST_STARTS, most // (_START_STEPS * n)))
        steps = most // (starts + rounds * _REHEATS // 2)

        def over() -> bool:
            return done() or clock.is_over(deadline)

        soon = replace(_COLD, steps=int(_FIRST_SHARE * work * STEPS_A_SECOND))
        found = [self._annealed([], budget_bytes, soon, over)]
        for seeds in (range(1, starts), range(starts, _MOST_STARTS)):
            for k in seeds:
                if over():
                    break
                if k > 1 and self._is_far(budget_bytes, known_seconds):
                    steps = max(steps, most - sum(one.steps for one in found))
                    found.append(self._annealed([], budget_bytes, replace(_COLD, steps=steps, seed=k), over))
                    break
                course = replace(_HOT if k % 3 == 2 else _COLD, steps=steps, seed=k)
                found.append(self._annealed([], budget_bytes, course, over))
            if not over():
                self._merge(program, budget_bytes, found, merging)
            if over() or not self._is_far(budget_bytes, far_seconds):
                break
        taken = sum(one.steps for one in found)
        for k in range(rounds):
            if not over() and not self._is_far(budget_bytes, known_seconds):
                taken += self._again(program, budget_bytes, replace(_AGAIN, steps=steps // 2, seed=k), merging, over)
        return taken

    def _annealed(self, runs: Runs, budget_bytes: int, course: Course, over: Callable[[], bool]) -> Annealed:
        """What one search finds from these further runs."""
        found = Annealing(self._plain.with_runs(runs, budget_bytes), course).run(over)
        if found.runs is not None:
            self._search.look(_NAME, found.runs)
        return found

    def _again(
        self, program: Program, budget_bytes: int, course: Course, merging: float, over: Callable[[], bool]
    ) -> int:
        """Anneal the best again in a few ways, and merge what becomes of it with it; the number of steps."""
        best = self._search.best_within(budget_bytes)
        if best is None:
            return 0
        runs = list(self._search.recall(best).runs)
        found = [Annealed(runs, best.extra_seconds, 0)]
        for k in range(_REHEATS):
            if not over():
                again = replace(course, seed=_MOST_STARTS + _REHEATS * course.seed + k)
                found.append(self._annealed(runs, budget_bytes, again, over))
        if not over():
            self._merge(program, budget_bytes, found, merging)
        return sum(one.steps for one in found)

    def _merge(self, program: Program, budget_bytes: int, found: list[Annealed], seconds: float) -> None:
        """Look for a cheaper plan among the further runs of those that were found."""
        best = self._search.best_within(budget_bytes)
        plans = [one.runs for one in sorted(found, key=lambda one: one.extra_seconds) if one.runs is not None]
        if best is not None and len(plans) > 1:
            plain = self._plain.with_runs([], budget_bytes)
            runs = merged(program, plain, plans, best.extra_seconds, seconds)
            if runs is not None:
                self._search.look(_MERGED, runs)

    def lowering(self) -> Iterator[None]:
        """Look for the lowest peak, step by step: within a budget below the lowest so far, closer and closer to it."""
        plain = peak = self._plain.peak_bytes
        most = min(_MOST_FLOOR_STEPS, _FLOOR_STEPS * self._plain.n)
        gap, taken, runs, seed = (peak - self._least) / 8, 0, Runs(), 0
        while taken < most and gap > _LAST_STEP * plain:
            start = self._plain.with_runs(runs, int(peak - gap))
            annealing = Annealing(start, Course(most // 8, seed, cold=0.3, price=10.0, above=0.0))
            found = annealing.run(annealing.fits)
            taken, seed = taken + found.steps, seed + 1
            if found.runs is None:
                gap /= 2
            else:
                runs, peak = found.runs, self._search.look(_NAME, found.runs).peak_bytes
            yield

    def _is_far(self, budget_bytes: int, far_seconds: float) -> bool:
        best = self._search.best_within(budget_bytes)
        return best is None or best.extra_seconds > far_seconds
