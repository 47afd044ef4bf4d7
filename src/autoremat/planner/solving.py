"""``solve``: program and budget in, plan out.

It runs what fits into the time allowed and takes the best.

``auto`` works in three steps. (1) A *pool* of candidates that does not depend on the budget: minimum cuts for a grid of
prices and segmentations, nested segments and walks of the evicting executor for small budgets; made once per program.
(2) For the budget: the greedy; the best of the pool, filled up; the pool's candidates just above the budget, shaved
down and filled up; walks that start from what those drop. (3) The best is squeezed below the budget and filled up
again, or walked again, a few times. Since the pool is the same for all budgets and step 2 includes fixed smaller
budgets, more budget hardly ever costs more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from autoremat.planner import clock
from autoremat.planner.refusals import infeasible
from autoremat.planner.search.calls import folded_of, planned_as, unfolded, until_in
from autoremat.planner.search.memo import per_program
from autoremat.planner.search.tables import tables_of
from autoremat.planner.solvers import NAMES, solver_of
from autoremat.planner.wishes import NO_WISHES, Wishes, kept_anyway
from autoremat.program import (
    InfeasibleBudget,
    InvalidSchedule,
    Link,
    Plan,
    Program,
    Schedule,
    beyond_decisions,
    simulate,
)
from autoremat.program.decisions import can_carry_out
from autoremat.program.units import parse_budget

if TYPE_CHECKING:
    from autoremat.planner.search.optimum import Outcome
    from autoremat.planner.search.pool import Found, Pool


SOLVERS: Final = ("auto", "exact", "greedy", *NAMES)
"""Names that ``solve`` accepts as ``solver``."""

_WORK_SECONDS: Final = 7.0
"""The work of an effort of 1, in seconds of a nominal machine."""

LIMIT_SECONDS: Final = 10.0
"""The limit of time that goes with it."""

_FAR: Final = 0.1
"""The gap to the bound that a plan does not have without saying so."""

_REPEATS: Final = 20_000
"""Ops from which on ``auto`` looks for repetitions first: what it finds then takes a fraction of the time."""
_PATIENCE: Final = 3.0
"""How many times its part of the time limit a plan for a larger budget has: its work is small, and seldom cut short."""

_FIRST_SHARE: Final = 0.25
"""Of the time for ``exact``: what ``auto`` may take to find a schedule to start from."""

_TINY: Final = 24
"""Ops up to which ``auto`` asks the exact solver, too: it takes milliseconds."""

_SMALL: Final = 160
"""Ops up to which ``auto`` asks it where a gap of more than ``_GAP`` is left, for a part of the time."""

_GAP: Final = 0.002

_LOOK: Final = 0.1
"""That part."""

_WIDE_GAP: Final = 0.01
"""The gap beyond which it may have ``_LONG_LOOK`` of the time."""

_LONG_LOOK: Final = 0.6
"""Enough for about a hundred ops."""


def solve(
    program: Program,
    budget: int | float | str,
    *,
    solver: str = "auto",
    wishes: Wishes = NO_WISHES,
    time_limit_seconds: float = 10.0,
    effort: float | None = None,
    progress: Callable[[str, float], None] | None = None,
    first: bool = False,
    near: Plan | None = None,
    link: Link | None = None,
) -> Plan:
    """Find the cheapest known plan whose peak stays within the budget.

    Args:
        program: the step to plan.
        budget: bytes, a size such as ``"10GiB"``, or a share of the plain peak such as ``0.5`` or ``"50%"``.
        solver: one of ``SOLVERS``. ``auto`` compares many; ``exact`` goes on from there to the optimum of a small
            program (up to about a hundred ops; ``search/optimum.py`` says what it is the optimum of): the lower bound
            is then equal to the overhead, or says how far it got; the others are the classics by name.
        wishes: what is kept or recomputed, whatever the solver thinks.
        time_limit_seconds: when to stop looking for a better plan. Where that cuts the work short, ``Plan.stopped``
            says so; else the plan depends on nothing but the program, the budget and the effort.
        effort: how much work to do, whatever the machine and whatever else it does: 1.0 is most of what fits into ten
            seconds of a quiet one. None: as much as goes with the time limit, a tenth of its seconds.
        progress: called with what is being done and the share of the work that is done, from 0.0 to 1.0.
        first: what the greedy finds will do for ``auto``, where it fits: a tenth of the time or less. The floor is
            looked for no further than to know that the budget is not below it: ``Plan.floor_bytes`` may be larger.
        near: with ``first``, the plan of a similar program: what is computed again there is tried here, too.
        link: to a slower tier (that of the program unless given), where values may be moved to; the plan's program has
            it then, and waiting for copies counts as overhead. Recomputation alone has all of the time limit, so that
            the plan is never worse than without a link; what moves takes up to as long again. Not for engines that keep
            or recompute and no more.

    Raises:
        InfeasibleBudget: no schedule known to the solver fits.
        ValueError: an unknown solver, a budget that cannot be read, a pattern that matches nothing, or a solver that
            cannot do without what is to be recomputed.

    Example:
        >>> from autoremat.program import Op, Program, Value
        >>> values = Value("x", 4, fixed=True), Value("a", 8), Value("y", 4)
        >>> solve(Program("tiny", values, (Op("f", (0,), (1,), 1.0), Op("g", (1,), (2,), 2.0))), "16 B").overhead
        0.0
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    effort = time_limit_seconds / LIMIT_SECONDS if effort is None else effort
    link = program.link if link is None else link
    if link is not None:
        return _offloaded(
            without_link(program), budget, link,
            solver=solver, wishes=wishes, progress=progress, first=first, near=near,
            time_limit_seconds=time_limit_seconds, effort=effort,
        )  # fmt: skip
    wished = wishes.applied_to(program)
    with clock.limited(time_limit_seconds):
        try:
            plan = _solved(wished, budget, solver, effort * _WORK_SECONDS, progress or _silent, first=first, near=near)
        except InfeasibleBudget as error:
            raise (wishes.explained(error) if wishes else error) from None
        stopped = f"after {time_limit_seconds:g} s, the limit of time" if clock.has_cut() else plan.stopped
        return replace(plan, program=program, stopped=stopped)


def _offloaded(
    program: Program, budget: int | float | str, link: Link, *, wishes: Wishes, time_limit_seconds: float,
    effort: float, **asked: Any,
) -> Plan:  # fmt: skip
    """Find the plan where values may also move over a link."""
    from autoremat.planner.offloading import offloaded

    if program.abilities.reruns == "by decisions":
        raise ValueError(
            f"the engine of {program.name!r} keeps a value or computes it again; it cannot move one to another "
            "tier, so plan it without a link"
        )

    def alone(program: Program, budget_bytes: int, share: float) -> Plan:
        seconds = min(1.0, _PATIENCE * share) * time_limit_seconds
        return solve(program, budget_bytes, wishes=wishes, time_limit_seconds=seconds, effort=share * effort, **asked)

    is_thorough = asked.get("solver") == "auto" and not asked.get("first")
    try:
        return offloaded(program, budget, link, alone, wished=wishes.applied_to(program) if is_thorough else None)
    except InfeasibleBudget as error:
        raise (wishes.explained(error) if wishes else error) from None


def _solved(
    program: Program,
    budget: int | float | str,
    solver: str,
    work: float,
    progress: Callable[[str, float], None],
    *,
    first: bool,
    near: Plan | None,
) -> Plan:
    """Find a plan with so much work.

    The work is in seconds of a nominal machine.
    """
    plain_peak = simulate(program).peak_bytes
    budget_bytes = parse_budget(budget, plain_peak)
    if solver in NAMES:
        return _classic(program, budget_bytes, solver, plain_peak, clock.worked() + work)
    optimum = _optimum(program, budget_bytes, plain_peak) if solver == "auto" else None
    if optimum:
        progress("done", 1.0)
        return optimum
    early = _first_plan(program, budget_bytes, plain_peak, near) if first and solver == "auto" else None
    if early:
        return early
    repeated = _repeated_plan(program, budget_bytes, plain_peak) if solver == "auto" else None
    if repeated:
        progress("done", 1.0)
        return repeated
    begin, share = clock.worked(), _FIRST_SHARE if solver == "exact" else 1.0
    found = _pool_of(program).solve(
        program, budget_bytes, "greedy" if solver == "greedy" else "auto", share * work, progress
    )
    deadline = begin + work
    if solver == "exact":
        found = _made_exact(program, budget_bytes, found, deadline)
    elif solver == "auto":
        look = _exact_look(program, found) * work
        if look:
            found = _made_exact(program, budget_bytes, found, min(deadline, clock.worked() + look))
    if found.schedule is None:
        lowest = found.lowest or Schedule.plain(program)
        raise infeasible(program, budget_bytes, lowest, solver=solver)
    plan = _plan(
        program, found.schedule, budget_bytes, plain_peak, found.floor_bytes, found.lower_bound,
        solver if solver == "exact" else found.name, found.candidates,
    )  # fmt: skip
    if solver == "auto" and plan.overhead - plan.lower_bound > _FAR:
        steps = f"{found.steps:,} steps of annealing" if found.steps else "the work that goes with the effort"
        return replace(plan, stopped=f"after {steps}, far from the bound; a larger effort may find a better plan")
    return plan


def classics_of(
    program: Program, budget_bytes: int, *, time_limit_seconds: float = 10.0
) -> tuple[tuple[str, int, float], ...]:
    """Try each of the classics at a budget.

    They are ``(solver, peak_bytes, overhead)``, also where that does not fit.

    Keep everything is left out, and so is what finds nothing else. None is begun after the time limit.
    """
    found = []
    with clock.limited(time_limit_seconds):
        for name in NAMES:
            if name != "keep-everything" and not clock.is_over():
                timeline = simulate(program, _made_by(name, program, budget_bytes, inf))
                overhead = timeline.extra_seconds / program.seconds if program.seconds else 0.0
                if timeline.extra_seconds or timeline.peak_bytes <= budget_bytes:
                    found.append((name, timeline.peak_bytes, overhead))
    return tuple(found)


def _exact_look(program: Program, found: Found) -> float:
    """Choose the share of time that the exact solver is worth.

    The wider the gap, the more.
    """
    if found.schedule is None or program.passing:
        return 0.0
    gap = found.schedule.extra_seconds(program) - found.lower_bound * program.seconds
    if len(program.ops) > (_SMALL if gap > _GAP * program.seconds else _TINY):
        return 0.0
    return _LONG_LOOK if gap > _WIDE_GAP * program.seconds else _LOOK


def _made_exact(program: Program, budget_bytes: int, found: Found, deadline: float) -> Found:
    """Improve what is known by the exact solver."""
    from autoremat.planner.search.optimum import exact

    known = found.schedule
    if known and known.extra_seconds(program) <= found.lower_bound * program.seconds:
        return found
    if program.has_calls:
        return _made_exact_by_calls(program, budget_bytes, found, deadline)
    outcome = _of_all(program, budget_bytes) or exact(program, budget_bytes, known, deadline=deadline)
    if outcome.schedule and not can_carry_out(program, outcome.schedule):
        return replace(found, lower_bound=max(found.lower_bound, outcome.bound_seconds / (program.seconds or 1.0)))
    beside = found.candidates
    if known:
        timeline = simulate(program, known)
        beside = (("auto", timeline.peak_bytes, timeline.extra_seconds / (program.seconds or 1.0)), *beside)
    bound = max(found.lower_bound, outcome.bound_seconds / (program.seconds or 1.0)) if outcome.schedule else 0.0
    name = found.name if outcome.schedule is known else "exact"
    return replace(found, name=name, schedule=outcome.schedule, lower_bound=bound, candidates=beside)


def _made_exact_by_calls(program: Program, budget_bytes: int, found: Found, deadline: float) -> Found:
    """Do the same for a program with calls of several ops.

    They run again from their first op on.

    The optimum of the folded program is a schedule of the program, but stages of one call may share a prefix there. The
    optimum over single ops is a bound, because what runs again call by call is such a schedule.
    """
    from autoremat.planner.search.optimum import exact

    now, known = clock.worked(), found.schedule
    by_stages = exact(folded_of(program), budget_bytes, deadline=now + (deadline - now) / 2).schedule
    by_ops = exact(program, budget_bytes, deadline=deadline)
    total = program.seconds or 1.0
    bound = max(found.lower_bound, by_ops.bound_seconds / total) if by_ops.schedule else found.lower_bound
    better = unfolded(program, by_stages) if by_stages else None
    if better is None or (known and known.extra_seconds(program) <= better.extra_seconds(program)):
        return replace(found, lower_bound=bound)
    beside = found.candidates
    if known:
        timeline = simulate(program, known)
        beside = (("auto", timeline.peak_bytes, timeline.extra_seconds / total), *beside)
    return replace(found, name="exact", schedule=better, lower_bound=bound, candidates=beside)


def _of_all(program: Program, budget_bytes: int) -> Outcome | None:
    """Search all schedules of a tiny program for the cheapest.

    Of a recorded one the tape could not run them all.
    """
    from autoremat.planner.search.optimum import Outcome
    from autoremat.planner.search.tiny import MOST_OPS, cheapest

    if program.has_calls or len(program.ops) > MOST_OPS or program.abilities.reruns == "at asks":
        return None
    schedule = cheapest(program, budget_bytes)
    return Outcome(schedule, schedule.extra_seconds(program), is_cheapest=True) if schedule else None


def _silent(what: str, share: float) -> None:
    """Show no progress to those who did not ask."""


def _first_plan(program: Program, budget_bytes: int, plain_peak: int, near: Plan | None) -> Plan | None:
    """Take what the greedy or a similar plan finds, where that fits.

    It cannot be told what must not stay.
    """
    from autoremat.planner.search.floor import floor_of
    from autoremat.planner.search.pool import found_at_once

    if program.passing or not (floor := floor_of(program)).is_within(budget_bytes):
        return None
    found = found_at_once(program, budget_bytes, near)
    if found is None or found.schedule is None:
        return None
    return _plan(
        program, found.schedule, budget_bytes, plain_peak, floor.met_bytes, found.lower_bound, found.name,
        found.candidates,
    )  # fmt: skip


def _repeated_plan(program: Program, budget_bytes: int, plain_peak: int) -> Plan | None:
    """Plan a large program that repeats itself.

    None for all others, and where the plan is far from the bound.
    """
    from autoremat.planner.repeated import ENOUGH, folded_for_planning, solve_repeated
    from autoremat.planner.search.floor import floor_of

    if len(program.ops) < _REPEATS or budget_bytes >= plain_peak or program.passing:
        return None
    folded = folded_for_planning(program)
    if folded is None or not (floor := floor_of(program)).is_within(budget_bytes):
        return None
    try:
        found = solve_repeated(folded, budget_bytes)
    except InfeasibleBudget:
        return None
    if found.overhead > found.lower_bound + ENOUGH:
        return None
    schedule = Schedule.from_order(program, found.unfold().schedule.order)
    return _plan(program, schedule, budget_bytes, plain_peak, floor.met_bytes, found.lower_bound, "repeated", ())


def without_link(program: Program) -> Program:
    """Return the program as recomputation alone plans it.

    It is the same object every time, so what is known of it is found again.
    """
    return program if program.link is None else _without_link(program)


@per_program
def _without_link(program: Program) -> Program:
    return replace(program, link=None)


@per_program
def _pool_of(program: Program) -> Pool:
    """Make the program's pool, and keep it while the program lives."""
    from autoremat.planner.search.pool import Pool

    return Pool(program)


_POOLS: Final = _pool_of.kept


def _optimum(program: Program, budget_bytes: int, plain_peak: int) -> Plan | None:
    """Plan a uniform chain, whose optimum is known.

    None for all other programs.
    """
    from autoremat.planner.search.uniform import proven

    if program.passing or program.has_calls or program.abilities.are_limited:
        return None
    found = proven(program, budget_bytes)
    if found is None:
        return None
    if not found.fits:
        raise infeasible(program, budget_bytes, found.schedule, solver="auto")
    return _plan(program, found.schedule, budget_bytes, plain_peak, found.floor_bytes, found.lower_bound, "revolve", ())


def _made_by(solver: str, program: Program, budget_bytes: int, deadline: float) -> Schedule:
    """Ask one of the solvers of the folder for a schedule."""
    return unfolded(program, solver_of(solver)(planned_as(program), budget_bytes, deadline=deadline))


def _refuse_runs(program: Program, schedule: Schedule, solver: str) -> None:
    """Refuse a solver's schedule that the program's engine cannot carry out."""
    if can_carry_out(program, schedule):
        return
    most, beyond = program.abilities.most_runs, beyond_decisions(program, schedule)
    how = f"can run each op {most} times at most" if most is not None else "keeps a value or computes it again"
    raise ValueError(
        f"solver {solver!r} makes a schedule that the engine of {program.name!r} cannot carry out: it {how}, and "
        f"{beyond[0] if beyond else f'one runs {max(schedule.runs_of.values())} times'}; solver='auto' obeys that"
    )


def _classic(program: Program, budget_bytes: int, solver: str, plain_peak: int, deadline: float) -> Plan:
    from autoremat.planner.bounds.bounds import lower_bound

    schedule = _made_by(solver, program, budget_bytes, deadline)
    try:
        peak = simulate(program, schedule).peak_bytes
    except InvalidSchedule as error:
        raise InvalidSchedule(f"solver {solver!r} made a schedule that cannot be carried out: {error}") from error
    _refuse_runs(program, schedule, solver)
    if peak > budget_bytes:
        raise infeasible(program, budget_bytes, schedule, solver=solver)
    bound = lower_bound(program, budget_bytes) if budget_bytes < plain_peak else 0.0
    return _plan(program, schedule, budget_bytes, plain_peak, peak, bound, solver, ())


def _plan(
    program: Program,
    schedule: Schedule,
    budget_bytes: int,
    plain_peak: int,
    floor: int,
    bound: float,
    solver: str,
    candidates: tuple[tuple[str, int, float], ...],
) -> Plan:
    """Make the plan with the simulator's figures, not the planner's own."""
    from autoremat.planner.bounds.bounds import floor_bound

    _refuse_kept(program, schedule, solver)
    timeline = simulate(program, schedule)
    overhead = timeline.extra_seconds / program.seconds if program.seconds else 0.0
    return Plan(
        program=program,
        schedule=schedule,
        budget_bytes=budget_bytes,
        peak_bytes=timeline.peak_bytes,
        plain_peak_bytes=plain_peak,
        floor_bytes=floor if floor <= budget_bytes else timeline.peak_bytes,
        overhead=overhead,
        lower_bound=bound,
        solver=solver,
        candidates=candidates,
        floor_lower_bound_bytes=floor_bound(program),
    )


def _refuse_kept(program: Program, schedule: Schedule, solver: str) -> None:
    """Refuse a schedule that keeps what is to be recomputed.

    Not every solver can be told what not to keep.
    """
    tables = tables_of(planned_as(program))
    kept = kept_anyway(schedule, tables.passing, until_in(program, tables.until))
    if kept:
        raise ValueError(
            f"solver {solver!r} keeps {program.label(min(kept))!r} (and {len(kept) - 1} more), which recompute= "
            'forbids; solver="auto" can do without'
        )
