"""Plans that may move values: no worse than either choice alone, above the bound, within budget and tier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import Wishes, solve
from autoremat.planner.bounds.linked import bound_with_link_at, linked_bound, linked_floor_bound
from autoremat.planner.search.moving import gaps, moved, places
from autoremat.program import (
    Abilities,
    InfeasibleBudget,
    InvalidSchedule,
    Link,
    Offload,
    Once,
    Plan,
    Program,
    Schedule,
    simulate,
    verify,
)
from tests.fixed import examples
from tests.planner.chains import gpt, uniform_steps
from tests.planner.random_calls import call_steps
from tests.planner.random_programs import literature_steps, steps

RATES = st.sampled_from((1e-3, 2.0, 20.0, 1e6))


def links() -> st.SearchStrategy[Link]:
    tier = st.sampled_from((None, None, 0, 30, 100))
    return st.builds(Link, RATES, RATES, st.sampled_from((0.0, 0.1)), st.booleans(), tier)


def solved(program: Program, budget: int, link: Link | None = None) -> Plan | None:
    try:
        return solve(program, budget, link=link, effort=0.01)
    except InfeasibleBudget:
        return None


@pytest.mark.slow
@pytest.mark.guard
@examples(12, everyday=4)
@given(program=st.one_of(steps(), call_steps()), link=links(), share=st.floats(0, 1))
def test_both_choices_together_are_never_worse_than_one(program: Program, link: Link, share: float) -> None:
    linked = replace(program, link=link)
    low, high = linked_floor_bound(linked), simulate(program).peak_bytes
    budget = low + int(share * (high - low))
    both, alone = solved(program, budget, link), solved(program, budget)
    only = moved(linked, Schedule.plain(linked), budget)
    if both is None:
        assert alone is None
        assert only is None
        return
    assert verify(both.program, both) == ()
    assert both.peak_bytes <= budget
    assert both.floor_lower_bound_bytes <= both.peak_bytes
    least = min(inf if alone is None else alone.overhead, overhead_of(linked, only))
    assert both.overhead <= least + 1e-9
    if link.tier_bytes == 0:
        assert both.schedule.offloads == ()
    again = solved(program, budget, link)
    assert again is not None
    assert again.schedule == both.schedule
    assert Plan.from_json(both.to_json()) == both


@pytest.mark.parametrize("rate", [3.0, 30.0, 300.0])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_both_single_choices_are_among_what_a_plan_is_chosen_from(rate: float, share: float) -> None:
    """Asked for as a user asks for them: without a link, and with nothing to be computed again."""
    program, link = uniform_steps(10), Link(rate, rate)
    both = solve(program, share, link=link, effort=0.02)
    alone = solve(program, share, effort=0.02)
    only = solve(program, share, link=link, effort=0.02, wishes=Wishes(keep="*"))
    assert only.schedule.order == tuple(range(len(program.ops)))
    looked_at = {round(both.overhead, 9), *(round(overhead, 9) for _, _, overhead in both.candidates)}
    assert {round(alone.overhead, 9), round(only.overhead, 9)} <= looked_at
    assert both.overhead <= min(alone.overhead, only.overhead)


@pytest.mark.one_in(5, guard=True)
@pytest.mark.parametrize("solver", ["keep-everything", "revolve", "chen", "rotor", "greedy"])
def test_classics_with_a_link_are_within_the_budget_or_refused(solver: str) -> None:
    program, link = uniform_steps(10), Link(30.0, 30.0)
    peak = simulate(program).peak_bytes
    for budget in (peak, peak // 3, 100):
        try:
            plan = solve(program, budget, solver=solver, link=link, effort=0.02)
        except InfeasibleBudget as refused:
            floor = refused.floor_bytes
            plan = solve(program, floor, solver=solver, link=link, effort=0.02)
        else:
            floor = budget
        assert plan.peak_bytes <= floor


def overhead_of(program: Program, schedule: Schedule | None) -> float:
    if schedule is None:
        return inf
    return simulate(program, schedule).overhead_seconds / program.seconds if program.seconds else 0.0


def test_a_value_moves_only_where_the_budget_is_not_kept_without() -> None:
    program = uniform_steps(12)
    peak = simulate(program).peak_bytes
    assert solve(program, peak, link=Link(1e9, 1e9)).schedule.offloads == ()
    plan = solve(program, peak - 1, link=Link(1e9, 1e9))
    assert len(plan.schedule.offloads) == 1
    for k in range(len(plan.schedule.offloads)):
        fewer = plan.schedule.offloads[:k] + plan.schedule.offloads[k + 1 :]
        assert simulate(plan.program, replace(plan.schedule, offloads=fewer)).peak_bytes > plan.budget_bytes


@pytest.mark.slow
@pytest.mark.guard
def test_a_fast_link_hides_what_recomputation_would_cost() -> None:
    program = gpt(4)
    bytes_a_second = 40 * sum(v.nbytes for v in program.values) / program.seconds
    fast, slow = (solve(program, 0.5, link=Link(rate, rate), effort=0.05) for rate in (bytes_a_second, 1.0))
    alone = solve(program, 0.5, effort=0.05)
    assert fast.overhead < 0.2 * alone.overhead
    assert slow.overhead <= alone.overhead + 1e-9
    assert slow.schedule.offloads == ()


def test_budgets_below_what_recomputation_can_do_are_met() -> None:
    """What must not run again leaves all the same."""
    program = uniform_steps(12)
    once = replace(program, ops=tuple(replace(op, once=Once.GIVEN) for op in program.ops))
    floor = solve(once, 1.0).floor_bytes
    assert floor == simulate(once).peak_bytes
    plan = solve(once, floor // 2, link=Link(1e3, 1e3))
    assert plan.schedule.offloads
    assert plan.peak_bytes < floor
    with pytest.raises(InfeasibleBudget, match="moved to the tier"):
        solve(once, 1, link=Link(1e3, 1e3))


def test_engines_that_keep_or_recompute_refuse_a_link() -> None:
    program = replace(uniform_steps(4), abilities=Abilities("by decisions"))
    with pytest.raises(ValueError, match="without a link"):
        solve(program, 0.9, link=Link(1.0, 1.0))


# ---- the bound -----------------------------------------------------------------------------------------------------


@examples(12, everyday=3)
@given(program=literature_steps(min_ops=2, max_ops=3), link=links(), share=st.floats(0, 0.999))
def test_no_schedule_beats_the_bound(program: Program, link: Link, share: float) -> None:
    """Brute force: orders with a few reruns, every set of offloads, every moment for each."""
    linked = replace(program, link=link)
    low, high = linked_floor_bound(linked), simulate(program).peak_bytes
    budget = low + int(share * (high - low))
    best = min((s for s, peak in brute_force(linked) if peak <= budget), default=inf)
    bounds = [bound_with_link_at(linked, t, budget) for t in range(len(program.ops))]
    assert max(bounds) <= best + 1e-9
    assert linked_bound(linked, budget) * program.seconds <= best + 1e-9


@examples(8, everyday=3)
@given(program=literature_steps(min_ops=2, max_ops=3), link=links())
def test_no_schedule_has_a_lower_peak_than_the_bound_on_it(program: Program, link: Link) -> None:
    linked = replace(program, link=link)
    assert linked_floor_bound(linked) <= min(peak for _, peak in brute_force(linked))


def brute_force(program: Program) -> Iterator[tuple[float, int]]:
    """Extra seconds and peak of very many schedules. Exponential."""
    for order in orders(program):
        try:
            schedule = Schedule.from_order(program, order)
            simulate(program, schedule)
        except InvalidSchedule:
            continue
        ways: list[list[tuple[Offload, ...]]] = []
        for g in gaps(program, schedule, places(program, schedule)):
            span = range(g.begin, g.end + 1)
            moves = [Offload(g.value, g.begin - 1, p - 1, q, g.end) for p in span for q in span if p < q]
            ways.append([(), *((o,) for o in moves)])
        for chosen in product(*ways) if len(ways) < 4 else ():
            offloads = tuple(sorted((o for one in chosen for o in one), key=lambda o: o.send))
            timeline = simulate(program, replace(schedule, offloads=offloads))
            most = program.link.tier_bytes if program.link is not None else 0
            if most is None or timeline.tier_bytes <= most:
                yield timeline.overhead_seconds, timeline.peak_bytes


def orders(program: Program) -> Iterator[tuple[int, ...]]:
    """The program's order, and those with one rerun anywhere."""
    n = len(program.ops)
    yield tuple(range(n))
    for at, i in product(range(n), range(n)):
        if i < at and not program.ops[i].once:
            yield (*range(at), i, *range(at, n))


def test_the_bound_is_worth_something_where_the_link_is_slow() -> None:
    program = uniform_steps(12)
    budget = int(0.6 * simulate(program).peak_bytes)
    none, slow, fast = (linked_bound(replace(program, link=Link(rate, rate)), budget) for rate in (1e-6, 10.0, 1e9))
    assert 0 < slow <= none
    assert fast == 0.0
