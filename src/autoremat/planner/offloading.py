"""Plans with a third choice: to move values to a slower tier.

From there they are fetched back.

Recomputation and offload compete: values are moved out of schedules that recompute for this budget and for larger
ones, the plain program among them (``search/moving.py``), and what takes the least extra time by the model is the plan.
So it is never slower than recomputation alone, nor than offload alone, and a value moves only where the budget is not
kept without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Final

from autoremat.planner import clock
from autoremat.planner.bounds.linked import linked_bound, linked_floor_bound
from autoremat.planner.refusals import infeasible
from autoremat.planner.search.lending import lent_schedules
from autoremat.planner.search.moving import Moving, moved
from autoremat.program import InfeasibleBudget, Link, Plan, Program, Schedule, Timeline, simulate
from autoremat.program.units import parse_budget

_RUNGS: Final = 6
"""How many larger budgets are planned, the plain peak among them."""
_LARGER_SHARE: Final = 0.4
"""The effort for all of them, as a share of that for the budget itself."""
_BOUND_SECONDS: Final = 2.0
"""The most work for the bound."""
_HARDLY: Final = 1e-4
"""An overhead that no further budget is planned to avoid."""

Solve = Callable[[Program, int, float], Plan]
"""Plans recomputation alone: of a program, within a budget, in a share of the time."""


@dataclass(frozen=True)
class _Candidate:
    name: str
    schedule: Schedule
    timeline: Timeline

    @property
    def rank(self) -> tuple[float, int]:
        """Less time first, then fewer bytes moved."""
        return self.timeline.overhead_seconds, self.timeline.sent_bytes


def offloaded(
    program: Program, budget: int | float | str, link: Link, solve: Solve, *, wished: Program | None
) -> Plan:  # fmt: skip
    """Find the fastest plan that recomputes values, or moves values.

    They move over a link; the plan is the one with the least extra time that is known.

    Args:
        program: the step.
        budget: as for ``solve``.
        link: to the tier.
        solve: plans recomputation alone.
        wished: the program with what a user wants kept, for the dynamic programming for chains; None where the first
            plan will do.

    Raises:
        InfeasibleBudget: nothing known fits.
    """
    linked = replace(program, link=link)
    plain_peak = simulate(program).peak_bytes
    budget_bytes = parse_budget(budget, plain_peak)
    if budget_bytes >= plain_peak:
        plan = solve(program, budget_bytes, 1.0)
        moved_peak = _peak(linked, _lowest(linked, plan.schedule))
        return replace(plan, program=linked, floor_bytes=min(plan.floor_bytes, moved_peak))
    refusal, base = None, None
    try:
        base = solve(program, budget_bytes, 1.0)
    except InfeasibleBudget as error:
        refusal = error
    bases = _larger(program, refusal.floor_bytes if refusal else budget_bytes, plain_peak, solve, also=bool(refusal))
    found = [] if base is None else [_Candidate(base.solver, base.schedule, simulate(linked, base.schedule))]
    # What is promised here must be kept elsewhere: where the budget is feasible, only what does not depend on it.
    lowest = [_lowest(linked, plan.schedule) for plan in (bases if refusal else bases[:1])]
    for plan in bases:
        schedule = moved(linked, plan.schedule, budget_bytes)
        if schedule is not None:
            name = "offload" if not plan.overhead else f"{plan.solver} and offload"
            found.append(_Candidate(name, schedule, simulate(linked, schedule)))
            if found[-1].timeline.overhead_seconds <= _HARDLY * program.seconds:
                break
    if (
        wished is not None
        and min((c.timeline.overhead_seconds for c in found), default=inf) > _HARDLY * program.seconds
    ):
        lent = lent_schedules(replace(wished, link=link), budget_bytes)
        found += [_Candidate("rotor and offload", s, simulate(linked, s)) for s in lent]
    if not found and refusal and not lowest:
        raise refusal
    if not found:
        raise infeasible(linked, budget_bytes, min(lowest, key=lambda s: _peak(linked, s)), solver="auto")
    best = min(found, key=lambda c: c.rank)
    floors = [best.timeline.peak_bytes, *(_peak(linked, s) for s in lowest), *([base.floor_bytes] if base else [])]
    return _plan(linked, best, found, base, budget_bytes, plain_peak, min(floors))


def _larger(program: Program, budget_bytes: int, plain_peak: int, solve: Solve, *, also: bool) -> list[Plan]:
    """Make plans for larger budgets, the largest first.

    The largest one recomputes nothing but what it is asked to. ``also``: for this budget, too.
    """
    found = []
    for k in range(_RUNGS, -1 if also else 0, -1):
        try:
            found.append(
                solve(program, budget_bytes + (plain_peak - budget_bytes) * k // _RUNGS, _LARGER_SHARE / _RUNGS)
            )
        except InfeasibleBudget:
            break
    return found


def _lowest(linked: Program, schedule: Schedule) -> Schedule:
    """Move values out of a schedule, to the lowest known peak."""
    moving = Moving(linked, schedule)
    return moving.within(moving.least_bytes, 1.0) or schedule


def _peak(linked: Program, schedule: Schedule) -> int:
    return simulate(linked, schedule).peak_bytes


def _plan(
    linked: Program, best: _Candidate, found: list[_Candidate], base: Plan | None, budget_bytes: int, plain_peak: int,
    floor_bytes: int,
) -> Plan:  # fmt: skip
    total = linked.seconds or 1.0
    deadline = clock.worked() + _BOUND_SECONDS
    bound = linked_bound(linked, budget_bytes, deadline=deadline) if best.timeline.overhead_seconds > 0 else 0.0
    beside = [(c.name, c.timeline.peak_bytes, c.timeline.overhead_seconds / total) for c in found if c is not best]
    return Plan(
        program=linked,
        schedule=best.schedule,
        budget_bytes=budget_bytes,
        peak_bytes=best.timeline.peak_bytes,
        plain_peak_bytes=plain_peak,
        floor_bytes=floor_bytes,
        overhead=best.timeline.overhead_seconds / total,
        lower_bound=min(bound, best.timeline.overhead_seconds / total),
        solver=best.name,
        candidates=tuple(beside) + (base.candidates if base else ()),
        floor_lower_bound_bytes=linked_floor_bound(linked),
        stopped=base.stopped if base and not best.schedule.offloads else "",
    )
