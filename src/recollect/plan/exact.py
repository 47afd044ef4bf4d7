"""The cheapest schedule of a small program, by integer linear programming (HiGHS through scipy).

The linear program of ``stages`` with a stage for every op is solved over whole numbers: first without the rows for the
bytes at further runs, then with those of the stages that the solution has overfilled, until a solution can be carried
out (constraint generation, as in Benders 1962). The best schedule known so far decides which columns can still be part
of a better one: a column whose reduced cost in the relaxation would lift the cost above it is fixed (Crowder, Johnson
and Padberg 1983), which is most of them.

Optimal among the schedules that run an op at most once more within a stage, in program order there, and in a recorded
program only where the tape can: before an ``unpack``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from recollect.plan.stages import Stages
from recollect.plan.tables import split_point
from recollect.program import Program, Schedule, simulate

_HAIR = 1e-7
"""Costs closer than this share of the whole are equal."""


@dataclass(frozen=True)
class Outcome:
    """What the exact solver knows when it stops.

    Attributes:
        schedule: the best schedule within the budget, None when none was found.
        bound_seconds: further runs cost at least this much in every schedule of the kind that is looked at; ``inf``
            when there is none within the budget.
    """

    schedule: Schedule | None
    bound_seconds: float


def exact(program: Program, budget_bytes: int, known: Schedule | None = None, *, deadline: float = inf) -> Outcome:
    """The cheapest schedule within the budget, and a bound that is equal to its cost when that is proven.

    Args:
        program: the step; up to about a hundred ops.
        budget_bytes: the most bytes at any run.
        known: a schedule within the budget; the better it is, the faster this goes.
        deadline: on ``time.monotonic``.
    """
    return _Solver(program, budget_bytes, known, deadline).solve()


class _Solver:
    def __init__(self, program: Program, budget_bytes: int, known: Schedule | None, deadline: float) -> None:
        self.program, self.budget_bytes, self.deadline = program, budget_bytes, deadline
        self.best = known
        self.best_cost = known.extra_seconds(program) if known else inf
        self.bound = 0.0
        self.unit = _unit(program)
        self.stages = Stages(program, budget_bytes, range(len(program.ops)), _where(program), self.unit)
        self.filled: set[int] = set()
        import os
        n=len(program.ops); k=int(os.environ.get("SINCE","0"))
        if k:
            split=min(split_point(program),n-1)
            for t in sorted({split+(n-1-split)*j//k for j in range(k)}): self.stages.since(t)

    def solve(self) -> Outcome:
        while self.bound < self.best_cost * (1 - _HAIR) and time.monotonic() < self.deadline:
            if not self._round():
                break
        return Outcome(self.best, min(self.bound, self.best_cost))

    def _round(self) -> bool:
        """Solve the program as it is; False when nothing more is to be had in the time."""
        table = self.stages.table
        found = _relaxed(table, self.deadline)
        if found is None:
            return False
        if not self._raise_bound(found.cost):
            return False
        low, high = self._bounds(found)
        result = milp(
            np.array(table.cost),
            integrality=np.array(table.whole),
            bounds=Bounds(low, high),
            constraints=LinearConstraint(table.matrix(), -np.inf, np.array(table.most)),
            options={"time_limit": max(0.1, self.deadline - time.monotonic()), "mip_rel_gap": 0.0},
        )
        print('  milp', result.status, result.fun, result.mip_dual_bound, 'lp', found.cost, 'best', self.best_cost/self.unit, 'free', int((high>low).sum()), 'of', len(low), 'rows', len(table.most), 'filled', len(self.filled), round(self.deadline-time.monotonic(),1), flush=True)
        if result.status == 2:
            self.bound = self.best_cost
            return False
        if result.mip_dual_bound is not None and not self._raise_bound(result.mip_dual_bound):
            return False
        if result.x is None:
            return False
        return self._take(result.x) and result.status == 0

    def _raise_bound(self, cost: float) -> bool:
        """Take over a bound; False when it closes the gap."""
        self.bound = max(self.bound, cost * self.unit)
        return self.bound < self.best_cost * (1 - _HAIR)

    def _take(self, point: npt.NDArray[np.float64]) -> bool:
        """Keep a schedule that fits, or fill in the rows that it breaks; False when that changes nothing."""
        schedule = Schedule.from_order(self.program, self.stages.order(point))
        over = self._overfilled(schedule)
        if not over:
            cost = schedule.extra_seconds(self.program)
            if cost < self.best_cost:
                self.best, self.best_cost = schedule, cost
            return False
        new = over - self.filled
        for w in sorted(new):
            self.stages.inside(w)
        self.filled |= new
        return bool(new)

    def _overfilled(self, schedule: Schedule) -> set[int]:
        """The stages in which the schedule exceeds the budget."""
        over: set[int] = set()
        seen = -1
        for i, nbytes in zip(schedule.order, simulate(self.program, schedule).resident_bytes, strict=True):
            if nbytes > self.budget_bytes:
                over.add(seen + 1)
            seen = max(seen, i)
        return over

    def _bounds(self, found: _Relaxed) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What the columns may be in a schedule that is cheaper than the best known one."""
        table = self.stages.table
        low, high = np.array(table.low), np.array(table.high)
        room = self.best_cost / self.unit * (1 + _HAIR) - found.cost
        whole = np.array(table.whole, dtype=bool)
        high[whole & (found.reduced > room)] = 0.0
        low[whole & (found.reduced < -room)] = 1.0
        return low, np.maximum(low, high)


@dataclass(frozen=True)
class _Relaxed:
    cost: float
    reduced: npt.NDArray[np.float64]


def _relaxed(table: Any, deadline: float) -> _Relaxed | None:
    result = linprog(
        table.cost,
        A_ub=table.matrix(),
        b_ub=table.most,
        bounds=np.stack([table.low, table.high], axis=1),
        method="highs",
        options={"time_limit": max(0.1, deadline - time.monotonic())},
    )
    if result.status == 2:
        return _Relaxed(inf, np.zeros(len(table.cost)))
    return _Relaxed(result.fun, result.lower.marginals + result.upper.marginals) if result.status == 0 else None


def _where(program: Program) -> list[bool] | None:
    """The stages in which the tape can run ops again; everywhere in a program that does not say."""
    unpacks = [op.name == "unpack" for op in program.ops]
    return unpacks if any(unpacks) else None


def _unit(program: Program) -> float:
    """Seconds per unit of cost: whole costs where the seconds are multiples of the shortest, else 1e4 in the step."""
    seconds = np.array([op.seconds for op in program.ops if op.seconds > 0])
    if not len(seconds):
        return 1.0
    ratios = seconds / seconds.min()
    if ratios.max() < 1e5 and np.allclose(ratios, np.round(ratios), rtol=0, atol=1e-9):
        return float(seconds.min())
    return float(seconds.sum() / 1e4)
