"""``frontier``: overhead against peak, from the floor to plain training.

Every budget is solved by ``solve``; all share the pool of candidates that the program has. What one budget finds is
used for the others: a plan stands for every larger budget at which nothing cheaper is known, and a lower bound holds
for every smaller budget. So along the frontier more budget never costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autoremat.planner import clock
from autoremat.planner.refusals import infeasible
from autoremat.planner.solving import LIMIT_SECONDS, _pool_of, _silent, solve, without_link
from autoremat.planner.wishes import NO_WISHES, Wishes
from autoremat.program import InfeasibleBudget, Plan, Program, Timeline, simulate
from autoremat.program.units import parse_budget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Budget = int | float | str
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Frontier:
    """Overhead against peak.

    Attributes:
        program: the step.
        points: a plan per budget, by rising budget; each has its ``budget_bytes``, ``peak_bytes``, ``overhead`` and
            ``lower_bound``. Neither overheads nor lower bounds rise from one to the next.
        floor_bytes: the smallest budget that is accepted, whoever plans.
        plain_peak_bytes: the peak without any recomputation.
    """

    program: Program
    points: tuple[Plan, ...]
    floor_bytes: int
    plain_peak_bytes: int

    @property
    def timelines(self) -> tuple[Timeline, ...]:
        """Simulate every point.

        O(points * runs).
        """
        return tuple(simulate(plan.program, plan) for plan in self.points)

    def plan_at(self, budget: Budget) -> Plan:
        """Return the frontier's cheapest plan within a budget.

        The budget may be one of the points or not.

        Raises:
            InfeasibleBudget: no plan of the frontier fits.
            ValueError: a budget that cannot be read.
        """
        budget_bytes = parse_budget(budget, self.plain_peak_bytes)
        lowest = self.points[0]
        if budget_bytes < lowest.peak_bytes:
            raise infeasible(lowest.program, budget_bytes, lowest.schedule, solver="frontier")
        return _best(self.points, budget_bytes)

    def plot(self, path: str | Path | None = None, *, beside: Sequence[str] = ()) -> Figure:
        """Draw the frontier, and save it where a path is given.

        Args:
            path: of the picture; its suffix decides the format, and folders on the way are made.
            beside: names of solvers (``autoremat.planner.SOLVERS``) to mark what they reach at the same budgets.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install 'autoremat[plots]'``).
        """
        from autoremat.show.plots import frontier_plot

        return frontier_plot(self, path, marks={name: reached(self, name) for name in beside})

    def to_json(self, path: str | Path | None = None) -> str:
        """Write the figures as JSON text, also to ``path`` if given.

        The format is ``autoremat-frontier``, version 1. Where there is a link, points have ``sent_bytes``,
        ``tier_bytes`` and ``waited_seconds``, too.
        """
        from autoremat.program.json_format import write_json

        figures = ("budget_bytes", "peak_bytes", "overhead", "lower_bound", "solver")
        points = [{name: getattr(plan, name) for name in figures} for plan in self.points]
        if self.program.link is not None:
            moved = ("sent_bytes", "tier_bytes", "waited_seconds")
            for point, timeline in zip(points, self.timelines, strict=True):
                point |= {name: getattr(timeline, name) for name in moved}
        data = {
            "format": "autoremat-frontier",
            "version": 1,
            "name": self.program.name,
            "timing": self.program.timing,
            "measured_share": self.program.measured_share,
            "floor_bytes": self.floor_bytes,
            "plain_peak_bytes": self.plain_peak_bytes,
            "points": points,
        }
        return write_json(data, path)

    def __str__(self) -> str:
        """Lay out a table with a bar for every budget."""
        from autoremat.show.text import frontier_text

        return frontier_text(self)

    def _repr_html_(self) -> str:
        """Show the frontier in a notebook."""
        from autoremat.show.page import as_html

        return as_html(str(self))


def frontier(
    program: Program,
    *,
    points: int | Sequence[Budget] = 16,
    wishes: Wishes = NO_WISHES,
    time_limit_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Frontier:
    """Overhead against peak, from the floor to the plain peak.

    Args:
        program: the step.
        points: how many budgets, the floor and the plain peak included, closer together towards the floor, where the
            overhead is steep; or the budgets themselves.
        wishes: as for ``solve``.
        time_limit_seconds: when to stop looking for better plans, all budgets together; where some take longer than
            they should, the others still get a quarter of their part.
        progress: called with what is being done and the share of the work that is done, from 0.0 to 1.0.

    Raises:
        ValueError: fewer than two points, a budget that cannot be read, a pattern that matches nothing.
        InfeasibleBudget: one of the budgets named is below the floor.

    Example:
        >>> from autoremat.program import Op, Program, Value
        >>> values = Value("x", 4, fixed=True), Value("a", 8), Value("b", 16), Value("y", 4), Value("z", 4)
        >>> ops = Op("f", (0,), (1,), 1.0), Op("g", (0,), (2,), 2.0), Op("h", (2,), (3,), 2.0), Op("k", (1, 3), (4,))
        >>> [(p.peak_bytes, p.overhead) for p in frontier(Program("tiny", values, ops), points=2).points]
        [(24, 0.2), (32, 0.0)]
    """
    _check(points)
    if not program.ops:
        raise ValueError(f"program {program.name!r} has no operators, so there is nothing to trade memory for")
    try:
        plans = _solve_all(wishes.applied_to(program), points, time_limit_seconds, progress)
    except InfeasibleBudget as error:
        raise (wishes.explained(error) if wishes else error) from None
    best = tuple(replace(_best(plans, p.budget_bytes), program=program) for p in plans)
    return Frontier(program, best, best[0].floor_bytes, best[0].plain_peak_bytes)


def frontier_of_plans(
    plan_within: Callable[[int], Plan], program: Program, floor_bytes: int, points: int | Sequence[Budget]
) -> Frontier:
    """Trace the frontier of a step whose program depends on the budget.

    Args:
        plan_within: from bytes to a plan, of whichever program of the step.
        program: the step as it is recorded for plain training.
        floor_bytes: the smallest budget that has a plan.
        points: as for ``frontier``.

    Raises:
        ValueError: fewer than two points, a budget that cannot be read.
        InfeasibleBudget: one of the budgets named is below the floor.
    """
    _check(points)
    plain_peak = simulate(program).peak_bytes
    plans = [plan_within(nbytes) for nbytes in _budgets(points, floor_bytes, plain_peak)]
    return Frontier(program, tuple(_best(plans, p.budget_bytes) for p in plans), floor_bytes, plain_peak)


def _check(points: int | Sequence[Budget]) -> None:
    if isinstance(points, str | float) or not points or (isinstance(points, int) and points < 2):
        raise ValueError(f"points is at least 2 (the floor and the plain peak), or a list of budgets; got {points!r}")


def reached(front: Frontier, solver: str, *, time_limit_seconds: float = 10.0) -> tuple[Plan, ...]:
    """Ask another solver for plans at a frontier's budgets.

    Where it reaches nothing there is none.
    """
    found = []
    for point in front.points:
        try:
            found.append(solve(front.program, point.budget_bytes, solver=solver, time_limit_seconds=time_limit_seconds))
        except InfeasibleBudget:
            continue
    return tuple(found)


_FOR_ALL = 0.2
"""The share of the time for candidates that all budgets start from."""

_AT_LEAST = 0.25
"""The share of its even part that every budget gets, even where others have taken longer than they should."""


def _solve_all(program: Program, points: int | Sequence[Budget], limit: float, progress: Progress | None) -> list[Plan]:
    """Solve every budget, in rising order."""
    from autoremat.planner.search.floor import floor_of

    end, pool, progress = clock.now() + limit, _pool_of(without_link(program)), progress or _silent
    progress("floor", 0.0)
    plain_peak_bytes, effort = simulate(program).peak_bytes, limit / LIMIT_SECONDS
    floor_bytes = floor_of(without_link(program)).nbytes
    if program.link is not None:
        floor_bytes = solve(program, plain_peak_bytes, effort=_FOR_ALL * effort).floor_bytes
    budgets = _budgets(points, floor_bytes, plain_peak_bytes)
    plans = []
    n = len(budgets)
    with pool.shared(_FOR_ALL * limit, _part(progress, 0.05, 0.1)):
        for k, budget_bytes in enumerate(budgets):
            share = max((end - clock.now()) / (n - k), _AT_LEAST * limit / n)
            part = _part(progress, 0.1 + 0.9 * k / n, 0.1 + 0.9 * (k + 1) / n, f"budget {k + 1} of {n}, ")
            plans.append(solve(program, budget_bytes, time_limit_seconds=share, effort=effort / n, progress=part))
    progress("done", 1.0)
    return plans


def _budgets(points: int | Sequence[Budget], floor_bytes: int, plain_peak_bytes: int) -> list[int]:
    if isinstance(points, int):
        room = max(0, plain_peak_bytes - floor_bytes)
        return sorted({floor_bytes + room * k * k // (points - 1) ** 2 for k in range(points)})
    return sorted({parse_budget(b, plain_peak_bytes) for b in points})


def _part(progress: Progress, begin: float, end: float, where: str = "") -> Progress:
    """Progress of a part of the work as that of the whole."""
    return lambda what, share: progress(where + what, begin + (end - begin) * share)


def _best(plans: Sequence[Plan], budget_bytes: int) -> Plan:
    """Choose the cheapest plan that fits, and the largest valid bound.

    Of equal ones, the plan that moves less.
    """
    fitting = (p for p in plans if p.peak_bytes <= budget_bytes)
    plan = min(fitting, key=lambda p: (p.overhead, p.schedule.moved_bytes(p.program), p.peak_bytes))
    bound = max((p.lower_bound for p in plans if p.budget_bytes >= budget_bytes), default=0.0)
    return replace(plan, budget_bytes=budget_bytes, lower_bound=bound)
