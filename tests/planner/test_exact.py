"""The exact solver: figures of the literature, brute force on small programs, ``auto`` beside it on larger ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import clock, solve
from autoremat.planner.search.optimum import exact
from autoremat.program import InfeasibleBudget, Op, Plan, Program, Value, simulate, verify
from tests.fixed import examples
from tests.planner.brute_force import optimum
from tests.planner.random_graphs import checkmate_chain, graph, layered
from tests.planner.random_programs import literature_steps, recorded_steps
from tests.strategies import programs

DATA = Path(__file__).parent / "data"
UNIT = 10


def budget_between(program: Program, share: float) -> int:
    """A budget between the floor of ``auto`` and the plain peak."""
    plain = max(1, simulate(program).peak_bytes)
    floor = solve(program, plain).floor_bytes
    return max(1, floor + int(share * (plain - floor)))


def is_cheapest(program: Program, plan: Plan) -> bool:
    """Whether the exact solver can prove that no schedule of its kind is cheaper."""
    outcome = exact(program, plan.budget_bytes, plan.schedule, deadline=clock.worked() + 300)
    assert outcome.bound_seconds <= plan.schedule.extra_seconds(program) + 1e-9
    return outcome.is_cheapest and outcome.schedule == plan.schedule


LARGE = pytest.mark.slow, pytest.mark.guard


@pytest.mark.parametrize("solver", ["auto", "exact"])
@pytest.mark.parametrize(
    ("layers", "budget", "runs"),
    [
        (8, 7.0, 20), (8, 5.0, 22), pytest.param(8, 4.0, 26, marks=LARGE),
        *(pytest.param(16, *of, marks=LARGE) for of in ((10.8, 41), (7.2, 44))),
    ],
)  # fmt: skip
def test_the_optima_of_checkmates_unit_chain(solver: str, layers: int, budget: float, runs: int):
    program = checkmate_chain(layers, UNIT)
    plan = solve(program, int(budget * UNIT), solver=solver)
    assert verify(program, plan) == ()
    assert len(plan.schedule.order) == runs
    assert is_cheapest(program, plan)


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 15), marks=LARGE)], ids=["some", "more"])
@pytest.mark.parametrize("make", [graph, layered])
def test_equal_to_brute_force_on_graphs_of_ten_ops(make, seeds):
    for seed in seeds:
        program = make(seed, 10)
        budget = budget_between(program, 0.7 * random.Random(seed).random())
        plan = solve(program, budget, solver="exact")
        best = optimum(program, budget)
        assert best is not None
        assert verify(program, plan) == ()
        assert plan.schedule.extra_seconds(program) == pytest.approx(best, abs=1e-9), seed
        assert plan.lower_bound == pytest.approx(plan.overhead, abs=1e-9), seed


def test_between_first_runs_only_program_order_is_looked_at_and_the_bound_knows():
    """The cheapest schedule of this graph runs ops again in another order: no bound may rise above it."""
    program = graph(27, 10)
    outcome = exact(program, 135)
    best = optimum(program, 135)
    assert best is not None
    assert outcome.is_cheapest
    assert outcome.schedule is not None
    assert outcome.bound_seconds <= best < outcome.schedule.extra_seconds(program)


@pytest.mark.slow
@examples(60)
@given(program=st.one_of(programs(max_ops=5), literature_steps(3, 5)), share=st.floats(0.0, 0.8))
def test_equal_to_brute_force_with_scratch_holds_and_overwriting(program: Program, share: float):
    budget = budget_between(program, share)
    plan = solve(program, budget, solver="exact")
    assert verify(program, plan) == ()
    assert plan.schedule.extra_seconds(program) == pytest.approx(optimum(program, budget), abs=1e-9)
    assert is_cheapest(program, plan)


@examples(20, everyday=8)
@given(program=recorded_steps(3, 5), share=st.floats(0.0, 0.8))
def test_recorded_steps_run_again_only_where_the_tape_can(program: Program, share: float):
    budget = budget_between(program, share)
    plan = solve(program, budget, solver="exact")
    best = optimum(program, budget)
    assert verify(program, plan) == ()
    assert best is not None
    assert best - 1e-9 <= plan.schedule.extra_seconds(program)
    assert plan.overhead <= solve(program, budget).overhead
    assert only_before_unpacks(program, plan.schedule.order)


def only_before_unpacks(program: Program, order: tuple[int, ...]) -> bool:
    following = 0
    for i in order:
        if i == following:
            following += 1
        elif program.ops[following].kind != "ask":
            return False
    return True


def test_bytes_at_further_runs_count():
    """``c`` must run again beside ``a``, which the first runs never need at the same time."""
    values = [Value("x", 1, fixed=True), Value("a", 10), Value("b", 12), Value("c", 3), Value("d", 12), Value("y", 1)]
    ops = [Op("a", (0,), (1,), 4.0), Op("b", (1,), (2,), 1.0), Op("c", (2,), (3,), 1.0), Op("d", (3,), (4,), 1.0)]
    program = Program("beside", tuple(values), (*ops, Op("y", (1, 3), (5,), 1.0)))
    for budget in range(simulate(program).peak_bytes + 1):
        best = optimum(program, budget)
        if best is None:
            with pytest.raises(InfeasibleBudget):
                solve(program, budget or 1, solver="exact")
        else:
            assert solve(program, budget, solver="exact").schedule.extra_seconds(program) == best


def test_a_floor_below_the_one_of_auto_is_found():
    program = layered(35, 10)
    below = solve(program, 1.0).floor_bytes - 1
    with pytest.raises(InfeasibleBudget):
        solve(program, below)
    plan = solve(program, below, solver="exact")
    assert plan.schedule.extra_seconds(program) == optimum(program, below)
    assert plan.floor_bytes <= below


def test_without_time_it_says_how_far_it_got():
    program = layered(1, 70)
    plan = solve(program, budget_between(program, 0.2), solver="exact", time_limit_seconds=0.0)
    assert verify(program, plan) == ()
    assert 0 <= plan.lower_bound < plan.overhead


def test_auto_is_reported_beside_it():
    program = layered(2, 40)
    plan = solve(program, budget_between(program, 0.5), solver="exact")
    beside = {name: overhead for name, _, overhead in plan.candidates}
    assert plan.solver == "exact"
    assert plan.overhead <= beside["auto"] < beside["greedy"]


@pytest.mark.slow
@pytest.mark.real_seconds
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_auto_is_close_to_the_optimum_of_a_recorded_block(share: float):
    program = Program.from_json(DATA / "gpt-block.json")
    budget = budget_between(program, share)
    best = solve(program, budget, solver="exact", time_limit_seconds=60)
    assert verify(program, best) == ()
    assert is_cheapest(program, best)
    assert solve(program, budget).overhead <= best.overhead + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("make", [graph, layered])
def test_auto_is_optimal_on_nearly_all_graphs_of_ten_ops(make):
    off: dict[int, float] = {}
    for seed in range(100):
        program = make(seed, 10)
        budget = budget_between(program, 0.7 * random.Random(seed).random())
        above = solve(program, budget).overhead - (optimum(program, budget) or 0.0) / program.seconds
        if above > 1e-9:
            off[seed] = above
    assert len(off) <= 5
    assert max(off.values(), default=0.0) <= 0.02, off


@pytest.mark.slow
@pytest.mark.real_seconds
@pytest.mark.parametrize("n_ops", [40, 60, 80, 100])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_auto_is_close_to_the_optimum_of_larger_graphs(n_ops: int, share: float):
    for seed in range(2):
        program = layered(seed, n_ops)
        budget = budget_between(program, share)
        best = solve(program, budget, solver="exact", time_limit_seconds=300)
        assert is_cheapest(program, best), seed
        assert solve(program, budget).overhead <= best.overhead + 0.01, seed
