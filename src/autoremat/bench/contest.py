"""``rows_of``: a solver on every program of the benchmark, judged beside the best that is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from autoremat.bench.catalog import Best, Catalog, Task
from autoremat.bench.judge import judged
from autoremat.planner import solve
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, simulate, verify

Own = Callable[..., Schedule]
"""A solver of one's own: ``schedule(program, budget_bytes, *, deadline)``, as those of ``planner/solvers``."""

_SLACK = 1e-6
"""Sums of seconds differ in their last digits."""


@dataclass(frozen=True)
class Effort:
    """How much a solver may do for one budget: real seconds, and the work that goes with them unless it is said."""

    seconds: float = 10.0
    work: float | None = None


@dataclass(frozen=True)
class Row:
    """What a solver made of one budget of one program.

    Attributes:
        task: the program.
        number: of the budget, from 0.
        plan: what was found; None where nothing fits.
        seconds: that it took.
        faults: what the judge, or ``verify``, says against it.
    """

    task: Task
    number: int
    plan: Plan | None
    seconds: float
    faults: tuple[str, ...]

    @property
    def best(self) -> Best:
        """What is known of this budget."""
        return self.task.budgets[self.number]

    @property
    def verdict(self) -> str:
        """One word beside the best that is known."""
        if self.faults:
            return "REFUSED"
        if self.plan is None:
            return "none" if self.best.overhead is not None else "as known"
        if self.best.overhead is None or self.plan.overhead < self.best.overhead - _SLACK:
            return "BETTER"
        return "as known" if self.plan.overhead <= self.best.overhead + _SLACK else "worse"


def rows_of(
    catalog: Catalog,
    solver: str | Own,
    effort: Effort,
    *,
    only: str = "",
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Row]:
    """A row for every program whose name contains ``only``, and every budget."""
    tasks = [task for task in catalog.tasks if only in task.name]
    for k, task in enumerate(tasks):
        data = catalog.program_data(task.name)
        program = Program.from_json(data)
        for number, best in enumerate(task.budgets):
            if progress:
                progress(task.name, (k + number / len(task.budgets)) / len(tasks))
            begin = time.perf_counter()
            plan = _plan(program, best.budget_bytes, solver, effort)
            seconds = time.perf_counter() - begin
            yield Row(task, number, plan, seconds, faults_of(data, program, plan, best) if plan else ())


def faults_of(data: Mapping[str, Any], program: Program, plan: Plan, best: Best) -> tuple[str, ...]:
    """What speaks against a plan: its figures by the judge, its rules by ``verify``, and a bound that is broken."""
    verdict = judged(data, plan.schedule.order, plan.schedule.frees)
    faults = [*verdict.faults, *map(str, verify(program, plan.schedule, budget_bytes=best.budget_bytes))]
    if verdict.peak_bytes > best.budget_bytes:
        faults.append(f"its peak is {verdict.peak_bytes} bytes, the budget {best.budget_bytes}")
    if verdict.peak_bytes != plan.peak_bytes:
        faults.append(f"its peak is {verdict.peak_bytes} bytes, and not {plan.peak_bytes}")
    if abs(verdict.overhead - plan.overhead) > _SLACK:
        faults.append(f"its overhead is {verdict.overhead}, and not {plan.overhead}")
    if plan.lower_bound > verdict.overhead + _SLACK:
        faults.append(f"its bound is {plan.lower_bound}, but it takes {verdict.overhead}")
    if best.bound > verdict.overhead + _SLACK:
        faults.append(f"it takes {verdict.overhead}, less than the bound {best.bound} of {best.bound_by}")
    if best.overhead is not None and plan.lower_bound > best.overhead + _SLACK:
        faults.append(f"its bound is {plan.lower_bound}, but {best.by} takes {best.overhead}")
    return tuple(faults)


def _plan(program: Program, budget_bytes: int, solver: str | Own, effort: Effort) -> Plan | None:
    try:
        if isinstance(solver, str):
            return solve(program, budget_bytes, solver=solver, time_limit_seconds=effort.seconds, effort=effort.work)
        schedule = solver(program, budget_bytes, deadline=inf)
    except InfeasibleBudget:
        return None
    timeline = simulate(program, schedule)
    if timeline.peak_bytes > budget_bytes:
        return None
    overhead = timeline.extra_seconds / (program.seconds or 1.0)
    plain = simulate(program).peak_bytes
    return Plan(program, schedule, budget_bytes, timeline.peak_bytes, plain, 0, overhead, 0.0, "own")
