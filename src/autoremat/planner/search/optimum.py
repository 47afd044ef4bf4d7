"""The cheapest schedule of a small program, by integer linear programming (HiGHS through scipy).

The linear program of ``stages`` with a stage for every op is solved over whole numbers: first without the rows for the
bytes at reruns, then with those of the stages that the solution has overfilled, until a solution can be carried
out (constraint generation, as in Benders 1962). The best schedule known so far decides which columns can still be part
of a better one: a column whose reduced cost in the relaxation would lift the cost above it is fixed (Crowder, Johnson
and Padberg 1983).

The optimum is that of the schedules that run an op at most once more within a stage, in program order there, and in a
recorded program only where the tape can: before an ``unpack``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

import numpy as np
import numpy.typing as npt

from autoremat.planner import clock
from autoremat.planner.bounds.stages import Relaxed, Stages
from autoremat.planner.search.tables import split_point
from autoremat.program import Program, Schedule, simulate

_HAIR: Final = 1e-7
"""Costs that differ by a smaller share are equal."""

_LARGEST: Final = 2_000_000
"""Stages times values beyond which there is no point in trying."""

_LOOKS: Final = 8
"""From how many moments on all later stages are looked at together."""

_SHARE: Final = 0.8
"""Of the time left for one integer program: the next one may have to take back an overfilled stage."""


@dataclass(frozen=True)
class Outcome:
    """What the exact solver knows when it stops.

    Attributes:
        schedule: the best schedule within the budget, None when none was found.
        bound_seconds: reruns cost at least this much in every schedule whatever.
        is_cheapest: no schedule of the kind that is looked at is cheaper; ``schedule`` is None when none fits.
    """

    schedule: Schedule | None
    bound_seconds: float
    is_cheapest: bool


def exact(program: Program, budget_bytes: int, known: Schedule | None = None, *, deadline: float = inf) -> Outcome:
    """The cheapest schedule within the budget, and a bound that is equal to its cost when that is proven.

    Args:
        program: the step; up to about a hundred ops.
        budget_bytes: the most bytes at any run.
        known: a schedule within the budget; the better it is, the faster this goes.
        deadline: on ``clock.worked``; then the outcome is as far as it got.

    Exponential at worst; seconds for a hundred ops where ``known`` is close to the optimum.
    """
    if len(program.ops) * len(program.values) > _LARGEST or not program.ops:
        return Outcome(known, 0.0, is_cheapest=False)
    return _Solver(program, budget_bytes, known, deadline).solve()


class _Solver:
    """The integer program of one program and budget, the best schedule so far and the bound so far."""

    def __init__(self, program: Program, budget_bytes: int, known: Schedule | None, deadline: float) -> None:
        self.program, self.budget_bytes, self.deadline = program, budget_bytes, deadline
        self.best = known
        self.best_cost = known.extra_seconds(program) if known else inf
        self.bound = 0.0
        self.bound_of_all = 0.0
        """The part of the bound that assumes nothing of the order of reruns, nor of where they are."""
        self.unit = _unit(program)
        where = _where(program)
        self.anywhere = where is None
        self.stages = Stages(program, budget_bytes, range(len(program.ops)), where, self.unit)
        self.filled: set[int] = set()
        for t in _looks(program):
            self.stages.since(t)

    def solve(self) -> Outcome:
        """Rounds until the gap is closed, nothing changes any more or the time is over."""
        while not self._closed() and not clock.is_over(self.deadline) and self._round():
            pass
        closed = self._closed()
        bound = self.best_cost if self.bound_of_all >= self.best_cost * (1 - _HAIR) else self.bound_of_all
        return Outcome(self.best, bound, closed)

    def _closed(self) -> bool:
        return self.bound >= self.best_cost * (1 - _HAIR)

    def _round(self) -> bool:
        """Solve the integer program as it is now; False when another round would not bring more."""
        relaxed = self.stages.table.relax(self.deadline - clock.worked())
        if relaxed is None:
            return False
        self._raise_bound(relaxed.cost)
        if self._closed():
            return False
        low, high = self._bounds(relaxed)
        found = self.stages.table.solve(_SHARE * (self.deadline - clock.worked()), low=low, high=high)
        # Columns are fixed as in a schedule that is cheaper than the best: no point means that there is none.
        self._raise_bound(min(found.bound, self.best_cost / self.unit))
        return found.point is not None and self._take(found.point)

    def _bounds(self, relaxed: Relaxed) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What the columns may be in a schedule that is no dearer than the best known one."""
        table = self.stages.table
        low, high = np.array(table.low), np.array(table.high)
        room = self.best_cost / self.unit * (1 + _HAIR) - relaxed.cost
        free = np.array(table.whole, dtype=bool)
        high[free & (relaxed.reduced > room)] = 0.0
        low[free & (relaxed.reduced < -room)] = 1.0
        return low, high

    def _raise_bound(self, cost: float) -> None:
        self.bound = max(self.bound, cost * self.unit)
        if not self.filled and self.anywhere:
            self.bound_of_all = self.bound

    def _take(self, point: npt.NDArray[np.float64]) -> bool:
        """Keep a schedule that fits, or add the rows of the stages that it overfills; True when rows were added."""
        schedule = Schedule.from_order(self.program, self.stages.order(point))
        new = self._overfilled(schedule) - self.filled
        for w in sorted(new):
            self.stages.inside(w)
        self.filled |= new
        cost = schedule.extra_seconds(self.program)
        if cost < self.best_cost and simulate(self.program, schedule).peak_bytes <= self.budget_bytes:
            self.best, self.best_cost = schedule, cost
        return bool(new)

    def _overfilled(self, schedule: Schedule) -> set[int]:
        """The stages in which the schedule exceeds the budget."""
        over: set[int] = set()
        following = 0
        for i, nbytes in zip(schedule.order, simulate(self.program, schedule).resident_bytes, strict=True):
            if nbytes > self.budget_bytes:
                over.add(following)
            following = max(following, i + 1)
        return over


def _where(program: Program) -> list[bool] | None:
    """The stages in which the tape can run ops again; everywhere in a program that does not say."""
    return None if program.abilities.reruns == "anywhere" else [op.kind == "ask" for op in program.ops]


def _looks(program: Program) -> list[int]:
    """Moments along the backward."""
    last = len(program.ops) - 1
    split = min(split_point(program), last)
    return sorted({split + (last - split) * k // _LOOKS for k in range(_LOOKS)})


def _unit(program: Program) -> float:
    """Seconds per unit of cost: whole costs where the seconds have a common measure, else a ten-thousandth of all."""
    seconds = np.array([op.again_seconds for op in program.ops if op.again_seconds > 0])
    if not len(seconds):
        return 1.0
    for parts in range(1, 25):
        multiples = seconds / seconds.min() * parts
        if multiples.max() < 1e5 and np.allclose(multiples, np.round(multiples), rtol=0, atol=1e-9):
            return float(seconds.min() / parts)
    return float(seconds.sum() / 1e4)
