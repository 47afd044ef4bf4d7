"""Annealing of retention intervals as a part of the search: how often, from where, for the floor and for a budget.

Only where any op may run again anywhere: there nothing tells forward from backward, values leave and come back all
along the program, and what keeps or drops values once (``shave``, ``fill``, cuts) has little to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from autoremat.planner import clock
from autoremat.planner.bounds.bounds import floor_bound
from autoremat.planner.search.annealing import STEPS_A_SECOND, Annealed, Annealing, Course
from autoremat.planner.search.retention import Retention, Runs
from autoremat.planner.search.search import Search
from autoremat.program import Program

_NAME = "annealing"

_SHARES = (0.8, 0.2)
"""How the steps are divided: one search from the program as it is, then one from the best that is known."""

_MOST_STEPS = 300
"""For each op, of the searches within one budget: small programs need no more."""

_MOST_ROUNDS = 8
"""Of searches, where the best found stays far from the bound."""

_FLOOR_STEPS, _MOST_FLOOR_STEPS = 100, 40_000
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
        self, budget_bytes: int, work: float, done: Callable[[], bool], far_seconds: float, deadline: float
    ) -> int:
        """Search within a budget for so much work, up to the deadline while the best takes longer than ``far_seconds``.

        Returns the number of steps.
        """
        taken, most = 0, min(int(STEPS_A_SECOND * work), _MOST_STEPS * self._plain.n)
        for k in range(_MOST_ROUNDS):
            if done() or clock.is_over(deadline) or (k >= len(_SHARES) and not self._is_far(budget_bytes, far_seconds)):
                break
            steps = int(most * _SHARES[k % len(_SHARES)])
            best = self._best(budget_bytes) if k % 2 else None
            start = self._plain.with_runs(best or [], budget_bytes)
            course = Course(steps, k, hot=0.5, price=1.0) if best else Course(steps, k)
            taken += self._anneal(start, course, lambda: done() or clock.is_over(deadline)).steps
        return taken

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

    def _anneal(self, start: Retention, course: Course, enough: Callable[[], bool]) -> Annealed:
        found = Annealing(start, course).run(enough)
        if found.runs is not None:
            self._search.look(_NAME, found.runs)
        return found

    def _best(self, budget_bytes: int) -> Runs | None:
        """The further runs of the cheapest candidate that fits, where they are retention intervals."""
        best = self._search.best_within(budget_bytes)
        runs = self._search.recall(best).runs if best else []
        return runs if runs and all(late > self._plain.facts.after[op] for late, op in runs) else None

    def _is_far(self, budget_bytes: int, far_seconds: float) -> bool:
        best = self._search.best_within(budget_bytes)
        return best is None or best.extra_seconds > far_seconds
