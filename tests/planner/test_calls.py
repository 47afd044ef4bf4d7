"""Programs whose ops run again as prefixes of calls: by hand, at random, and against the cheapest of all schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import SOLVERS, Wishes, frontier, solve
from autoremat.planner.bounds.bounds import lower_bound
from autoremat.planner.search.calls import Stage, fold, planned_as
from autoremat.planner.search.search import Candidate, Search
from autoremat.program import END, INSIDE, InfeasibleBudget, Once, Op, Program, Schedule, Value, simulate, verify
from autoremat.show.residents import residents_at
from autoremat.show.spans import spans_of
from tests.fixed import examples
from tests.planner.brute_force_calls import optimum_by_calls
from tests.planner.layers import BACKWARD, layers
from tests.planner.random_calls import call_steps
from tests.planner.random_programs import steps

SHARES = st.floats(0.0, 1.0)


# --- By hand ----------------------------------------------------------------------------------------------------------


def dropout() -> Program:
    """``dropout`` as two ops and a scale that nobody keeps; its mask is random."""
    values = (
        Value("x", 80, fixed=True),
        Value("u", 40, available=INSIDE),
        Value("mask", 10, available=1),
        Value("y", 80, available=2),
        Value("z", 80),
        Value("dy", 80),
    )
    ops = (
        Op("rand", (), (1,), 1.0, call=0),
        Op("less", (1,), (2,), 1.0, call=0),
        Op("mul", (0, 2), (3,), 1.0, call=0),
        Op("f", (3,), (4,), 1.0, call=1),
        Op("unpack", (3,), (), **BACKWARD, kind="ask"),
        Op("f_backward", (3, 4), (5,), 1.0, **BACKWARD),
        Op("unpack", (2,), (), **BACKWARD, kind="ask"),
        Op("mul_backward", (2, 5), (), 1.0, **BACKWARD),
    )
    return Program("dropout", values, ops)


def cross_entropy(*, total_ready: int = 2) -> Program:
    """``cross_entropy`` under autocast: a cast that nobody keeps, a log-softmax that is saved, a loss."""
    values = (
        Value("logits", 100, fixed=True),
        Value("wide", 200, available=INSIDE),
        Value("logp", 200, available=1),
        Value("loss", 4, held=END, available=2),
        Value("total", 4, available=total_ready),
        Value("dz", 200),
    )
    ops = (
        Op("cast", (0,), (1,), 1.0, call=5),
        Op("log_softmax", (1,), (2,), 3.0, call=5, scratch_bytes=7),
        Op("nll", (2,), (3, 4), 1.0, call=5),
        Op("unpack", (4,), (), **BACKWARD, kind="ask"),
        Op("unpack", (2,), (), **BACKWARD, kind="ask"),
        Op("nll_backward", (2, 4), (5,), 1.0, **BACKWARD),
    )
    return Program("cross_entropy", values, ops)


def test_linear_is_two_stages_of_which_the_second_costs_both():
    program = layers(1)
    folded = fold(program)
    assert folded.stages[:3] == (Stage(0, 0, 1), Stage(0, 2, 2), Stage(3, 3, 3))
    casts, product, gelu = folded.ops[:3]
    assert (casts.reads, casts.writes, casts.seconds, casts.again_seconds) == ((0, 1), (2, 3), 1.5, 1.5)
    assert (product.reads, product.writes, product.seconds, product.again_seconds) == ((0, 1), (4,), 8.0, 9.5)
    assert (product.scratch_bytes, product.again_scratch_bytes) == (0, 250)
    assert replace(gelu, call=1) == program.ops[3]
    assert simulate(folded).peak_bytes == simulate(program).peak_bytes


def test_what_stays_inside_of_a_call_is_scratch():
    folded = fold(cross_entropy())
    assert [op.name for op in folded.ops[:2]] == ["log_softmax", "nll"]
    softmax, nll = folded.ops[:2]
    assert (softmax.writes, softmax.again_seconds, softmax.again_scratch_bytes) == ((2,), 4.0, 207)
    assert (nll.writes, nll.again_seconds) == ((3, 4), 5.0)
    assert nll.again_scratch_bytes == 407 - 8  # cast and log-softmax, before the loss is there
    assert folded.values[1].nbytes == 0  # it is nowhere but in there


def test_an_op_that_must_not_run_again_takes_the_rest_of_its_call_with_it():
    program = dropout()
    ops = (replace(program.ops[0], once=Once.FOREIGN), *program.ops[1:])
    assert [op.once for op in fold(replace(program, ops=ops)).ops[:3]] == [Once.FOREIGN, Once.FOREIGN, None]
    ops = (*program.ops[:2], replace(program.ops[2], once=Once.KEPT), *program.ops[3:])
    assert [op.once for op in fold(replace(program, ops=ops)).ops[:3]] == [None, Once.KEPT, None]


def test_a_dropped_cast_runs_again_without_its_product():
    program = layers(4)
    plan = solve(program, 0.9)
    assert verify(program, plan) == ()
    again = {program.ops[i].name for i, n in plan.schedule.runs_of.items() if n > 1}
    assert again == {"cast", "gelu"}  # not the product


def test_two_stages_that_run_again_at_once_are_one_prefix():
    program = layers(1)
    folded = fold(program)
    late = folded.ops.index(next(op for op in folded.ops if op.kind == "ask"))
    order = [*range(late), 0, 1, *range(late, len(folded.ops))]
    assert folded.unfold(order)[5:8] == [0, 1, 2]
    assert folded.unfold([*range(late), 1, 0, *range(late, len(folded.ops))])[5:10] == [0, 1, 2, 0, 1]


def test_what_a_call_makes_on_the_way_stays_where_there_is_room():
    """The first product runs again before its casts are asked for: they stay, and are not made once more."""
    program = layers(3)
    plan = solve(program, 0.7)
    assert plan.schedule.runs_of[2] == 2
    assert plan.schedule.runs_of[0] == plan.schedule.runs_of[1] == 2
    assert plan.overhead * program.seconds == pytest.approx(3.5 + 9.5 + 3.5)


def test_what_the_call_cannot_hand_out_is_a_second_copy():
    """The log-softmax runs again for a value that is ready early, beside a kept one that is ready late."""
    program = replace(
        cross_entropy(), values=tuple(replace(v, available=2) if v.id == "logp" else v for v in cross_entropy().values)
    )
    order = (0, 1, 2, 0, 1, 3, 4, 5)
    schedule = Schedule.from_order(program, order)
    assert verify(program, schedule) == ()
    timeline = simulate(program, schedule)
    assert timeline.resident_bytes[4] == 100 + 200 + 4 + 4 + 200 + 200 + 7  # kept log-softmax, cast, another one


@pytest.mark.parametrize("wish", ["keep", "recompute"])
def test_wishes_speak_of_the_ops_of_the_program(wish: str):
    program = layers(3)
    plan = solve(program, 1.0, wishes=Wishes(**{wish: "cast"}))
    assert plan.program is program
    assert verify(program, plan) == ()
    again = [program.ops[i].name for i, n in plan.schedule.runs_of.items() if n > 1]
    assert ("cast" in again) == (wish == "recompute")
    if wish == "recompute":
        assert again.count("cast") == 6
        with pytest.raises(ValueError, match="keeps 'xh"):
            solve(program, 1.0, wishes=Wishes(recompute="cast"), solver="keep-everything")


@pytest.mark.slow
@pytest.mark.guard
def test_a_frontier_of_calls():
    front = frontier(layers(3), points=4)
    assert [p.overhead for p in front.points] == sorted((p.overhead for p in front.points), reverse=True)
    assert all(verify(front.program, p) == () for p in front.points)
    assert Program.from_json(front.program.to_json()) == front.program


def test_programs_without_calls_are_planned_as_they_are():
    program = replace(layers(2), values=tuple(replace(v, available=None) for v in layers(2).values))
    ops = tuple(replace(op, call=-1) for op in program.ops)
    single = tuple(replace(op, call=k if op.phase == "forward" else -1) for k, op in enumerate(ops))
    program = replace(program, ops=ops)
    assert planned_as(program) is program
    numbered = replace(program, ops=single)
    assert planned_as(numbered) is numbered  # every op is a call of its own
    assert solve(numbered, 0.7).schedule == solve(program, 0.7).schedule


# --- At random --------------------------------------------------------------------------------------------------------


def budget_at(program: Program, share: float) -> int:
    """A budget between the floor and the plain peak."""
    plain = max(1, simulate(program).peak_bytes)
    floor = solve(program, plain).floor_bytes
    return max(1, floor + int(share * (plain - floor)))


def drawn_candidate(data: st.DataObject, search: Search) -> Candidate:
    """Whatever is dropped, on up to three levels."""
    droppable = search.tables.droppable
    pick = st.frozensets(st.sampled_from(droppable)) if droppable else st.just(frozenset())
    keep, again = data.draw(pick), data.draw(st.lists(pick, max_size=2).map(tuple))
    return search.evaluate("", (frozenset(droppable) - keep, *again))


@examples(100)
@given(data=st.data(), program=call_steps())
def test_any_order_of_stages_is_a_schedule_of_the_program_and_the_account_is_the_simulators(
    data: st.DataObject, program: Program
):
    search = Search(program)
    candidate = drawn_candidate(data, search)
    folded, order = planned_as(program), candidate.account.order.tolist()
    schedule = Schedule.from_order(program, fold(program).unfold(order))
    timeline = simulate(program, schedule)
    assert verify(program, schedule, budget_bytes=timeline.peak_bytes) == ()
    assert candidate.peak_bytes == timeline.peak_bytes
    assert candidate.extra_seconds == pytest.approx(timeline.extra_seconds)
    assert not timeline.peak_bytes or verify(program, schedule, budget_bytes=timeline.peak_bytes - 1)
    by_stages = simulate(folded, Schedule.from_order(folded, order))
    assert by_stages.peak_bytes >= timeline.peak_bytes
    assert by_stages.extra_seconds >= timeline.extra_seconds - 1e-9


@examples(40)
@given(data=st.data(), program=call_steps())
def test_reports_count_what_the_simulator_counts(data: st.DataObject, program: Program):
    order = drawn_candidate(data, Search(program)).account.order.tolist()
    schedule = Schedule.from_order(program, fold(program).unfold(order))
    spans, during = spans_of(program, schedule), simulate(program, schedule).resident_bytes
    for p, i in enumerate(schedule.order):
        assert sum(r.nbytes for r in residents_at(program, schedule, p)) == during[p]
        assert sum(s.nbytes for s in spans if s.begin <= p <= s.end) + program.ops[i].scratch_bytes == during[p]


@examples(25, everyday=8)
@given(program=call_steps(), share=SHARES, solver=st.sampled_from(SOLVERS))
def test_plans_of_calls_are_lawful(program: Program, share: float, solver: str):
    budget = budget_at(program, share)
    try:
        plan = solve(program, budget, solver=solver)
    except InfeasibleBudget as error:
        assert solver not in ("auto", "exact")
        plan = solve(program, error.floor_bytes, solver=solver)
    assert verify(program, plan) == ()
    assert plan.floor_bytes <= plan.peak_bytes <= plan.budget_bytes
    assert plan.lower_bound <= plan.overhead + 1e-12
    assert plan.candidates is not None


@examples(8)
@given(program=call_steps(7), shares=st.tuples(SHARES, SHARES).map(sorted))
def test_more_budget_never_costs_more(program: Program, shares: list[float]):
    less, more = (budget_at(program, share) for share in shares)
    assert solve(program, more).overhead <= solve(program, less).overhead + 1e-12


@pytest.mark.slow
@pytest.mark.guard
@examples(40, everyday=6)
@given(program=call_steps(4), share=SHARES)
def test_no_schedule_of_calls_is_below_the_bound_nor_cheaper_than_brute_force(program: Program, share: float):
    budget = budget_at(program, share)
    best = optimum_by_calls(program, budget)
    assert best is not None
    assert lower_bound(program, budget) * program.seconds <= best + 1e-9
    assert best <= solve(program, budget).overhead * program.seconds + 1e-9


@examples(25, everyday=6)
@given(program=call_steps(4), share=SHARES)
def test_what_exact_claims_is_so(program: Program, share: float):
    """Where overhead and bound of the exact solver agree, that is the optimum of brute force."""
    budget = budget_at(program, share)
    plan, best = solve(program, budget, solver="exact"), optimum_by_calls(program, budget)
    assert best is not None
    assert plan.lower_bound * program.seconds <= best + 1e-9
    if plan.lower_bound >= plan.overhead - 1e-12:
        assert plan.overhead * program.seconds == pytest.approx(best)


@pytest.mark.slow
@pytest.mark.guard
@examples(25)
@given(program=steps(), share=SHARES, solver=st.sampled_from([s for s in SOLVERS if s not in ("auto", "exact")]))
def test_a_solver_reaches_the_floor_that_it_names(program: Program, share: float, solver: str):
    budget = max(1, program.fixed_bytes + int(share * (simulate(program).peak_bytes - program.fixed_bytes)))
    floor = _floor_named(program, budget, solver)
    assert floor is None or floor > budget
    assert floor is None or solve(program, floor, solver=solver).peak_bytes <= floor


def _floor_named(program: Program, budget: int, solver: str) -> int | None:
    try:
        solve(program, budget, solver=solver)
    except InfeasibleBudget as error:
        return error.floor_bytes
    return None
