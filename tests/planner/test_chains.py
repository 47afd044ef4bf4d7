"""The classics for chains: closed forms, hand-counted figures, brute force, and `checkpoint_schedules` as a witness."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import combinations, pairwise, product
from math import ceil, log2

import pytest
from checkpoint_schedules import optimal_steps_binomial
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import solve
from autoremat.planner.search.account import Accountant
from autoremat.planner.search.chain import Sweep, chain_of
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.uniform import proven, uniform_of
from autoremat.planner.solvers import solver_of
from autoremat.planner.solvers.chen import greedy_cuts, thresholds
from autoremat.planner.solvers.chen import schedule as chen
from autoremat.planner.solvers.chen_recursive import recursive_sweeps
from autoremat.planner.solvers.chen_recursive import schedule as chen_recursive
from autoremat.planner.solvers.revolve import revolve_forwards, revolve_sweeps
from autoremat.planner.solvers.revolve import schedule as revolve
from autoremat.planner.solvers.rotor import schedule as rotor
from autoremat.program import InfeasibleBudget, Op, Program, Schedule, Value, simulate, verify
from autoremat.program.model import END
from tests.fixed import examples
from tests.planner.brute_force import optimum
from tests.planner.chains import bytes_of_slots, chain, gpt, steps, uniform_steps
from tests.planner.random_programs import steps as random_steps
from tests.strategies import programs

LARGE = [(100, 10, 322), (250, 25, 723), pytest.param(1000, 10, 4636, marks=pytest.mark.slow)]


def forward_steps(program: Program, schedule: Schedule) -> int:
    """Runs of the steps of ``uniform_steps``; its n backward ops have one step each inside."""
    return sum(program.ops[i].name.startswith(("f", "b")) for i in schedule.order)


# -- Revolve -----------------------------------------------------------------------------------------------------------


def test_the_closed_form_is_that_of_checkpoint_schedules_and_of_the_sweeps():
    for n in range(1, 65):
        for s in range(1, 13):
            swept = n + sum(sweep.target - sweep.start + 1 for sweep in revolve_sweeps(n, s))
            assert revolve_forwards(n, s) == optimal_steps_binomial(n, s) == swept


@pytest.mark.parametrize(("n", "s", "forwards"), LARGE)
def test_known_figures_of_the_closed_form(n: int, s: int, forwards: int):
    assert revolve_forwards(n, s) == optimal_steps_binomial(n, s) == forwards


@pytest.mark.parametrize(("n", "s"), [(0, 1), (1, 0)])
def test_no_steps_or_no_slots_are_refused(n: int, s: int):
    with pytest.raises(ValueError, match=f"at least one step and one slot, got {n} steps and {s} slots"):
        revolve_forwards(n, s)


@pytest.mark.slow
@pytest.mark.guard
def test_auto_equals_the_closed_form_on_uniform_chains():
    for n in range(1, 65):
        program = uniform_steps(n)
        for s in range(1, 13):
            plan = solve(program, bytes_of_slots(s))
            assert forward_steps(program, plan.schedule) == revolve_forwards(n, s), (n, s)


def test_revolve_by_name_equals_the_closed_form_on_uniform_chains():
    for n in range(2, 65, 3):
        program = uniform_steps(n)
        for s in range(1, 13):
            assert forward_steps(program, revolve(program, bytes_of_slots(s))) == revolve_forwards(n, s), (n, s)


@pytest.mark.real_seconds
@pytest.mark.parametrize(("n", "s", "forwards"), [*LARGE, (5000, 70, 17372)])
def test_long_uniform_chains_are_planned_optimally_and_at_once(n: int, s: int, forwards: int):
    program = uniform_steps(n)
    begin = time.monotonic()
    plan = solve(program, bytes_of_slots(s))
    assert time.monotonic() - begin < 5
    assert forward_steps(program, plan.schedule) == forwards
    assert plan.overhead == pytest.approx(plan.lower_bound, abs=1e-12)
    assert verify(program, plan) == ()


@pytest.mark.parametrize(("n", "s"), [(5, 1), (12, 2), (30, 4), (64, 3)])
def test_steps_that_tape_run_as_often_as_the_closed_form_says(n: int, s: int):
    program = uniform_steps(n, taped=True)
    budget = bytes_of_slots(s) + 10_000  # one tape
    assert simulate(program, revolve(program, budget)).extra_seconds == revolve_forwards(n, s) - n
    assert simulate(program, rotor(program, budget)).extra_seconds <= revolve_forwards(n, s) - n


def test_a_recorded_uniform_chain_is_planned_optimally_too():
    plan = solve(chain(1000), bytes_of_slots(10))  # its input has no bytes, but another output is there in the backward
    assert plan.overhead * plan.program.seconds == pytest.approx(4636 - 1999)
    assert plan.solver == "revolve"


def test_a_uniform_chain_that_fits_nowhere_says_how_much_it_needs():
    with pytest.raises(InfeasibleBudget) as caught:
        solve(uniform_steps(20), 399)
    assert caught.value.floor_bytes == bytes_of_slots(1)


def test_gpt_is_no_uniform_chain():
    assert uniform_of(gpt(2)) is None


@examples(60)
@given(n=st.integers(5, 6), grad=st.integers(0, 3), state=st.integers(1, 3), budget=st.integers(3, 20))
def test_no_schedule_of_a_uniform_chain_is_below_its_bound(n: int, grad: int, state: int, budget: int):
    program = steps([state] * n, [1.0] * n, grad_bytes=grad)
    uniform, best = uniform_of(program), optimum(program, budget)
    assert uniform is not None
    assert best is None or budget >= uniform.floor_bytes
    if best is not None:
        assert uniform.extra_seconds(budget) <= best
        found = proven(program, budget)
        assert found is None or simulate(program, found.schedule).extra_seconds == best


# -- Chen --------------------------------------------------------------------------------------------------------------


def test_algorithm_3_cuts_where_the_sum_exceeds_the_threshold():
    blocks = chain_of(tables_of(chain(16)))
    assert greedy_cuts(blocks, 0) == (blocks.cuts, 1500, 100)
    cuts, kept, largest = greedy_cuts(blocks, 350)
    assert cuts == (4, 8, 12)
    assert (kept, largest) == (300, 400)


def test_the_appendix_searches_around_the_geometric_mean():
    first, middle, *grid = thresholds(chain_of(tables_of(chain(16))))
    assert first == 0
    assert middle == pytest.approx((1500 * 100) ** 0.5)
    assert len(grid) == 6
    assert (grid[0], grid[-1]) == pytest.approx((middle / 2, middle * 2))


def test_chen_on_a_uniform_chain():
    program = chain(16)
    timeline = simulate(program, chen(program, 804))
    assert (timeline.extra_seconds, timeline.peak_bytes) == (13, 804)  # as four equal segments


def test_the_recursion_takes_n_log_n_forwards_and_log_n_states():
    for n in (2, 4, 8, 16, 64):
        forwards = n + sum(s.target - s.start + 1 for s in recursive_sweeps(n, 1))
        assert forwards == n + n * log2(n) / 2
        peak = simulate(chain(n), chen_recursive(chain(n), 1)).peak_bytes
        assert peak <= 100 * (ceil(log2(n)) + 3)


def test_the_recursion_that_keeps_all_runs_every_block_again_at_most_once():
    assert [(s.target, s.start) for s in recursive_sweeps(4, 3)] == [(2, 2), (1, 1), (0, 0)]


# -- rotor -------------------------------------------------------------------------------------------------------------


@st.composite
def uneven_steps(draw: st.DrawFn) -> Program:
    n = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    seconds = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    return steps(sizes, [float(s) for s in seconds], grad_bytes=draw(st.integers(0, 9)))


@examples(60)
@given(program=uneven_steps(), share=st.floats(0.3, 1.0))
def test_rotor_is_never_below_brute_force(program: Program, share: float):
    budget = max(1, int(share * simulate(program).peak_bytes))
    best, schedule = optimum(program, budget), rotor(program, budget)
    timeline = simulate(program, schedule)
    assert verify(program, schedule) == ()
    if timeline.peak_bytes <= budget:
        assert best is not None
        assert best <= timeline.extra_seconds


def persistent(s: int, t: int, *, first: bool = True) -> Iterator[list[Sweep]]:
    """All memory-persistent schedules of the blocks s..t, in which what is kept stays until its backward."""
    for kept in (k for r in range(t - s + 1) for k in combinations(range(s + 1, t + 1), r)):
        parts = [(a, b - 1) for a, b in pairwise((s, *kept))]
        for choice in product(*(list(persistent(a, b, first=False)) for a, b in reversed(parts))):
            yield ([] if first else [Sweep(t, s)]) + [sweep for part in choice for sweep in part]


def test_rotor_is_the_best_of_all_persistent_schedules_and_mostly_of_all():
    optimal = feasible = 0
    for seed in range(40):
        dice = random.Random(seed)
        n = dice.randint(3, 6)
        sizes, seconds = ([dice.randint(1, 9) for _ in range(n)] for _ in range(2))
        program = steps(sizes, [float(s) for s in seconds], grad_bytes=dice.randint(0, 9))
        blocks, accountant = chain_of(tables_of(program)), Accountant(program)
        accounts = [accountant(accountant.order(blocks.runs(sweeps))) for sweeps in persistent(0, len(blocks) - 1)]
        for share in (0.5, 0.6, 0.7, 0.85):
            budget = int(share * simulate(program).peak_bytes)
            best, timeline = optimum(program, budget), simulate(program, rotor(program, budget))
            fitting = [account.extra_seconds for account in accounts if account.peak_bytes <= budget]
            assert (best is not None) == (timeline.peak_bytes <= budget)
            assert best is None or timeline.extra_seconds == min(fitting)
            feasible += best is not None
            optimal += timeline.extra_seconds == best
    assert (optimal, feasible) == (47, 50)


def test_rotor_is_never_worse_than_revolve_on_uniform_chains():
    for n in (5, 9, 16, 33):
        for program in (uniform_steps(n), chain(n), uniform_steps(n, taped=True)):
            for share in (0.9, 0.7, 0.5, 0.35, 0.2):
                budget = int(share * simulate(program).peak_bytes)
                ours, theirs = (simulate(program, f(program, budget)) for f in (rotor, revolve))
                if theirs.peak_bytes <= budget:
                    assert ours.peak_bytes <= budget
                    assert ours.extra_seconds <= theirs.extra_seconds


def test_rotor_keeps_whole_blocks_where_that_pays():
    program = gpt(6, vocabulary=256)
    budget = int(0.6 * simulate(program).peak_bytes)
    assert (
        simulate(program, rotor(program, budget)).extra_seconds
        < 0.6 * simulate(program, revolve(program, budget)).extra_seconds
    )


def test_rotor_has_a_schedule_even_where_its_estimates_exceed_the_plain_peak():
    values = (Value("x", 0, fixed=True), Value("a", 1), Value("b", 1), Value("c", 1), Value("y", 0, held=END))
    ops = (Op("f", (0,), (1,)), Op("g", (0, 1), (2,)), Op("h", (0,), (3,)), Op("k", (2,), (4,)))
    program = Program("unread", values, ops)
    assert verify(program, rotor(program, simulate(program).peak_bytes)) == ()


# -- all of them -------------------------------------------------------------------------------------------------------


@examples(60)
@given(
    program=st.one_of(programs(max_ops=8), random_steps()),
    solver=st.sampled_from(("chen", "chen-recursive", "revolve", "rotor", "dtr")),
    share=st.floats(0.1, 1.2),
)
def test_every_schedule_can_be_carried_out(program: Program, solver: str, share: float):
    budget = max(1, int(share * simulate(program).peak_bytes))
    schedule = solver_of(solver)(program, budget)
    assert verify(program, schedule) == ()


@pytest.mark.slow
@examples(30)
@given(program=random_steps(), solver=st.sampled_from(("chen", "chen-recursive", "revolve", "rotor", "dtr")))
def test_auto_is_never_worse_than_the_classics(program: Program, solver: str):
    budget = max(1, int(0.7 * simulate(program).peak_bytes))
    try:
        classic = solve(program, budget, solver=solver)
    except InfeasibleBudget:
        return
    assert solve(program, budget).overhead <= classic.overhead + 1e-12


def test_the_blocks_of_a_gpt_are_cut_where_one_value_crosses():
    program = gpt(4, vocabulary=256)
    blocks = chain_of(tables_of(program))
    assert {len(state) for state in blocks.states[1:]} == {1}
    assert len(blocks) >= 8
    assert list(blocks.moments) == sorted(blocks.moments, reverse=True)
    assert 3 <= len(chain_of(tables_of(program), 4)) <= 4
    assert set(chain_of(tables_of(program), 4).cuts) <= set(blocks.cuts)
    assert Accountant(program)(Accountant(program).order(blocks.runs(()))).extra_seconds == 0
