"""``solve``: quality on GPT steps, the error for what does not fit, and how it behaves as a function."""

import gc
import subprocess
import sys
import weakref
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import solve
from autoremat.planner import solving as portfolio
from autoremat.planner.search.pool import Pool
from autoremat.program import InfeasibleBudget, Op, Program, Value, simulate, verify
from tests.fixed import examples
from tests.planner.chains import chain, gpt
from tests.planner.random_calls import call_steps
from tests.planner.random_programs import steps


@pytest.mark.parametrize(
    ("arguments", "ratio"),
    [
        ({"n_blocks": 8, "vocabulary": 256}, 0.75),
        ({"n_blocks": 12, "vocabulary": 256}, 0.84),
        pytest.param({"n_blocks": 24, "vocabulary": 256}, 0.93, marks=pytest.mark.slow),
        pytest.param({"n_blocks": 12, "vocabulary": 256, "flash": False}, 0.92, marks=pytest.mark.slow),
    ],
)
def test_cheaper_than_every_block_at_its_peak_and_close_to_the_bound(arguments, ratio):
    program = gpt(**arguments)
    classic = solve(program, 1.0, solver="every-block")
    plan = solve(program, classic.peak_bytes)
    assert verify(program, plan) == ()
    assert plan.overhead <= ratio * classic.overhead
    assert plan.overhead <= 1.07 * plan.lower_bound


def test_optimal_where_the_logits_are_the_peak():
    program = gpt(12)
    classic = solve(program, 1.0, solver="every-block")
    plan = solve(program, classic.peak_bytes)
    assert plan.overhead == pytest.approx(plan.lower_bound, rel=1e-4)


def test_cheap_ops_first():
    plan = solve(gpt(8, vocabulary=256), 0.75)
    again = {plan.program.ops[i].name for i, n in plan.schedule.runs_of.items() if n > 1}
    assert again <= {"layer_norm", "gelu", "add", "embedding"}
    assert plan.overhead < 0.025


def test_the_greedy_is_reported_beside_the_plan():
    plan = solve(gpt(4, vocabulary=256), 0.5)
    rows = {name: (peak, overhead) for name, peak, overhead in plan.candidates}
    assert {"greedy", "min-cut"} <= rows.keys()
    assert plan.overhead <= min(overhead for peak, overhead in rows.values() if peak <= plan.budget_bytes)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3])
def test_the_first_plan_is_found_without_a_pool_and_costs_little_more(budget, monkeypatch):
    best = solve(gpt(4, vocabulary=256), budget)
    monkeypatch.setattr(portfolio, "_pool_of", None)
    first = solve(gpt(4, vocabulary=256), budget, first=True)
    assert verify(first.program, first) == ()
    assert first.peak_bytes <= best.budget_bytes
    assert first.lower_bound <= best.overhead + 1e-12
    assert best.overhead - 1e-12 <= first.overhead <= 1.5 * best.overhead + 0.02


@examples(20)
@given(st.one_of(steps(), call_steps()), st.floats(0.3, 1.0))
def test_the_first_plan_is_as_right_as_any_other(program, share):
    budget = int(share * simulate(program).peak_bytes)
    try:
        floor = solve(program, budget, time_limit_seconds=0.1).floor_bytes
    except InfeasibleBudget as error:
        floor = error.floor_bytes
        with pytest.raises(InfeasibleBudget) as refused:
            solve(program, budget, time_limit_seconds=0.1, first=True)
        assert refused.value.floor_bytes == floor
        return
    plan = solve(program, budget, first=True)
    assert verify(program, plan) == ()
    assert floor <= plan.peak_bytes <= budget
    assert plan.floor_bytes <= plan.peak_bytes


def test_a_uniform_chain_needs_far_less_than_one_further_run_at_the_peak_of_segments():
    program = chain(64)
    classic = solve(program, 1.0, solver="segments")
    assert solve(program, classic.peak_bytes).overhead < 0.9 * classic.overhead


def test_the_floor_of_a_chain_is_far_below_the_square_root():
    program = chain(64)
    assert solve(program, 1.0).floor_bytes < 0.75 * solve(program, 1.0, solver="segments").peak_bytes


def test_the_error_says_what_stands_in_the_way_and_what_to_do():
    program = gpt(4)
    with pytest.raises(InfeasibleBudget) as caught:
        solve(program, "300 MB")
    error = caught.value
    timeline = simulate(program, solve(program, error.floor_bytes).schedule)
    assert timeline.peak_bytes <= error.floor_bytes
    assert error.budget_bytes == 300_000_000
    assert error.peak_op == "log_softmax"
    assert error.largest[0] == ("head/head:42", 134217728)
    for part in (
        "300.0 MB (300000000 bytes)",
        f"({error.floor_bytes} bytes)",
        "op 43 (log_softmax, forward)",
        "/log_softmax:43 (134.2 MB)",
        f"budget of at least {error.floor_bytes} bytes",
        "smaller batch",
    ):
        assert part in str(error)


def test_the_error_names_module_and_source_where_they_are_known():
    values = (Value("x", 4, fixed=True), Value("a", 80, label="the big one"))
    op = Op("f", (0,), (1,), 1.0, module="net.0", source="train.py:7")
    with pytest.raises(InfeasibleBudget, match=r"op 0 \(f, forward\) in net.0 at train.py:7.*the big one \(80 B\)"):
        solve(Program("tiny", values, (op,)), 10)


@pytest.mark.parametrize("solver", ["greedy", "every-block"])
def test_the_error_of_a_classic_points_to_auto(solver):
    with pytest.raises(InfeasibleBudget, match='solver="auto" may know'):
        solve(chain(12), 210, solver=solver)


def test_programs_with_nothing_to_choose():
    empty = Program("empty", (Value("x", 4, fixed=True),), ())
    assert solve(empty, 4).schedule.order == ()
    values = (Value("x", 4, fixed=True), Value("a", 8))
    free = Program("free", values, (Op("f", (0,), (1,)),))
    assert solve(free, 12).overhead == 0.0


@pytest.mark.slow
def test_the_same_call_gives_the_same_plan_whatever_was_asked_before():
    budget = int(0.35 * simulate(gpt(6)).peak_bytes)
    first = solve(gpt(6), budget)
    program = gpt(6)
    for share in (0.9, 0.5, 0.3):
        solve(program, share)
    assert solve(program, budget).schedule == first.schedule


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make", [lambda: gpt(3), lambda: chain(24)], ids=["GPT", "chain"])
def test_what_is_found_for_one_budget_is_forgotten_before_the_next(make):
    """What a search for one budget finds must not get into the pool that all budgets start from."""
    program = make()
    pool = Pool(program)
    shares = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    bases = []
    for share in shares:
        pool.solve(program, int(share * simulate(program).peak_bytes), "auto", 10.0, lambda what, share: None)
        pool.grow(inf, lambda what, share: None, lambda: False)
        bases.append([(e.peak_bytes, e.extra_seconds) for e in pool._base])
    assert bases == [bases[0]] * len(shares)


def test_time_runs_out_without_harm():
    plan = solve(gpt(12, vocabulary=256), 0.5, time_limit_seconds=0.0)
    assert verify(plan.program, plan) == ()


def test_progress_is_told_from_zero_to_one():
    told: list[float] = []
    solve(chain(10), 0.6, progress=lambda what, share: told.append(share))
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)


def test_nothing_is_kept_of_a_program_that_is_gone():
    program = gpt(1, vocabulary=256)
    solve(program, 0.7)
    alive, key = weakref.ref(program), id(program)
    assert key in portfolio._POOLS
    del program
    gc.collect()
    assert alive() is None
    assert key not in portfolio._POOLS


def test_importing_the_planners_imports_neither_torch_nor_numpy():
    code = "import sys, autoremat.planner; print([m for m in ('torch', 'numpy', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None)
    assert done.stdout.strip() == "[]"
