"""Annealing of retention intervals as a part of the search: how often, from where, for the floor and for a budget.

Only where any op may run again anywhere: there nothing tells forward from backward, values leave and come back all
along the program, and what keeps or drops values once (``shave``, ``fill``, cuts) has little to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from autoremat.planner import clock
from autoremat.planner.bounds.bounds import floor_bound
from autoremat.planner.search.annealing import STEPS_A_SECOND, Annealing, Course
from autoremat.planner.search.merging import merged
from autoremat.planner.search.retention import Retention, Runs
from autoremat.planner.search.search import Search
from autoremat.program import Program

_NAME, _MERGED = "annealing", "merging"

_SQUARE_STEPS = 5
"""Steps for each pair of ops that count as much as a second of work at least: small programs need no more."""

_MERGING_SHARE = 0.4
"""Of the work, at least: for merging what the searches have found."""

_START_STEPS = 60
"""Of a search, for each op, at least."""

_MOST_STARTS = 8
"""Of searches, at most; where the best stays far from the bound, up to so many in any case."""

_HOT, _COLD = Course(0, hot=4.0, cold=0.1, above=0.03), Course(0)
"""How searches cool down in turn: small programs have a few large values to get right, large ones many small ones."""

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

        No longer than two starts while what was found takes longer than ``known_seconds``, which another search has
        found with next to no work: there the rest of the work is worth more elsewhere.

        Returns the number of steps.
        """
        n, taken, plans = self._plain.n, 0, list[tuple[float, Runs]]()
        most = int((1.0 - _MERGING_SHARE) * work * min(STEPS_A_SECOND, _SQUARE_STEPS * n * n))
        starts = max(2, min(_MOST_STARTS, most // (_START_STEPS * n)))

        def over() -> bool:
            return done() or clock.is_over(deadline)

        for seeds in (range(starts), range(starts, _MOST_STARTS)):
            for k in seeds:
                if over() or (k > 1 and self._is_far(budget_bytes, known_seconds)):
                    break
                course = replace(_HOT if k % 3 == 2 else _COLD, steps=most // starts, seed=k)
                found = Annealing(self._plain.with_runs([], budget_bytes), course).run(over)
                taken += found.steps
                if found.runs is not None:
                    self._search.look(_NAME, found.runs)
                    plans.append((found.extra_seconds, found.runs))
            if not over():
                self._merge(program, budget_bytes, [runs for _, runs in sorted(plans)], _MERGING_SHARE * work)
            if over() or not self._is_far(budget_bytes, far_seconds):
                break
        return taken

    def _merge(self, program: Program, budget_bytes: int, plans: list[Runs], seconds: float) -> None:
        """Look for a cheaper plan among the further runs of those that were found."""
        best = self._search.best_within(budget_bytes)
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
