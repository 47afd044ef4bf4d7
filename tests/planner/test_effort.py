"""Effort decides which plan is found, time only cuts, and the plan says when it did."""

from __future__ import annotations

import contextlib
import itertools
import json
import lzma
import random
from pathlib import Path
from unittest.mock import patch

import pytest

from autoremat import Plan, solve, verify
from autoremat.planner import clock
from autoremat.planner.bounds.stages import Table
from autoremat.planner.search.pool import Pool
from autoremat.program import InfeasibleBudget, Program, simulate
from benchmarks.layered import layered_graph
from benchmarks.training_graphs import layered, training_graph
from tests.fixed import fixed_planning

EFFORT = 0.1
RECORDED = Path(__file__).parents[2] / "benchmarks" / "programs" / "test-gpt.json.xz"


def planned_by(seconds_a_look: float, share: float, limit: float = 1e9, n: int = 60, effort: float = EFFORT) -> Plan:
    """A plan of a graph that nobody has planned before, by a clock that goes on so much at each look."""
    ticks = itertools.count()
    with patch.object(clock, "now", lambda: next(ticks) * seconds_a_look):
        return solve(layered_graph(n, 5), share, time_limit_seconds=limit, effort=effort)


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_a_slow_machine_finds_the_same_plan_byte_for_byte(share: float) -> None:
    quick, slow = planned_by(1e-6, share), planned_by(50.0, share)
    assert quick.overhead > 0
    assert quick.to_json() == slow.to_json()
    assert "limit of time" not in quick.stopped


def test_of_a_training_graph_too() -> None:
    found = []
    for step in (1e-6, 50.0):
        ticks = itertools.count()
        with patch.object(clock, "now", lambda ticks=ticks, step=step: next(ticks) * step):
            program = training_graph("layered", layered(30, 1))
            found.append(solve(program, 0.7, time_limit_seconds=1e9, effort=EFFORT).to_json())
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.guard
def test_other_budgets_asked_for_before_change_nothing() -> None:
    program = layered_graph(60, 5)
    solve(program, 0.8, time_limit_seconds=1e9, effort=EFFORT)
    again = solve(program, 0.75, time_limit_seconds=1e9, effort=EFFORT)
    assert again.to_json() == planned_by(1e-6, 0.75).to_json()


def test_a_plan_says_that_time_was_over() -> None:
    plan = planned_by(1.0, 0.75, limit=3.0)
    assert verify(plan.program, plan) == ()
    assert plan.stopped == "after 3 s, the limit of time"
    assert "stopped     after 3 s, the limit of time" in str(plan)
    assert Plan.from_json(plan.to_json()).stopped == plan.stopped


def test_where_time_is_over_soon_the_plan_of_the_greedy_is_there() -> None:
    """A pool of candidates for a large program may take longer than there is on a busy machine."""

    def too_late(pool: Pool, *asked: object) -> None:
        clock._METER.has_cut = True
        pool._restart()

    program = Program.from_json(json.loads(lzma.decompress(RECORDED.read_bytes())))
    with patch.object(Pool, "grow", too_late):
        found = solve(program, 0.9, effort=EFFORT)
    assert found.overhead <= solve(program, 0.9, solver="greedy").overhead


@pytest.mark.parametrize("solver", ["auto", "greedy", "exact"])
def test_without_any_time_there_is_a_plan_or_a_floor(solver: str) -> None:
    program = training_graph("layered", layered(30, 1))
    with patch.object(clock, "is_over", lambda *deadline, **how: True), contextlib.suppress(InfeasibleBudget):
        assert solve(program, 0.9, solver=solver).peak_bytes <= 0.9 * simulate(program).peak_bytes


def test_a_plan_far_from_the_bound_says_so() -> None:
    plan = planned_by(1e-6, 0.65, n=250, effort=0.01)
    assert plan.overhead - plan.lower_bound > 0.1
    assert "steps of annealing, far from the bound" in plan.stopped


def test_what_is_over_stays_over_and_an_inner_limit_ends_with_itself() -> None:
    ticks = itertools.count()
    with patch.object(clock, "now", lambda: float(next(ticks))), clock.limited(100.0):
        with clock.limited(2.0):
            while not clock.is_over():
                clock.spend(1.0)
            assert clock.has_cut()
            assert clock.is_over()
        assert not clock.has_cut()
        assert not clock.is_over()


def knapsack_by(seconds_a_look: float) -> tuple[float, float]:
    """The bound of a knapsack that takes some hundred nodes, and the work it took, by such a clock."""
    dice, table = random.Random(3), Table()
    columns = [table.column(-dice.uniform(1, 2)) for _ in range(40)]
    for _ in range(8):
        table.row([(dice.uniform(1, 2), c) for c in columns], 20.0)
    ticks = itertools.count()
    with patch.object(clock, "now", lambda: next(ticks) * seconds_a_look), clock.limited(1e9):
        begin = clock.worked()
        found = table.solve(0.1)
        return found.bound, clock.worked() - begin


@pytest.mark.real_seconds
def test_an_integer_program_ends_by_its_nodes_and_not_by_its_seconds() -> None:
    quick, slow = knapsack_by(1e-6), knapsack_by(50.0)
    assert quick == slow
    assert 0 < quick[1] <= 0.1


@pytest.mark.real_seconds
def test_an_integer_program_that_does_not_fit_into_the_effort_is_not_begun() -> None:
    table = Table()
    table.row([(1.0, table.column(-1.0)) for _ in range(1000)], 20.5)
    with patch("scipy.optimize.milp", side_effect=AssertionError):
        assert table.solve(0.001).point is None


def test_a_deadline_is_a_point_of_work() -> None:
    begin = clock.worked()
    clock.spend(2.0)
    assert clock.is_over(begin + 1.0)
    assert not clock.is_over(begin + 2.0)


def test_a_linear_program_that_time_has_cut_is_no_secret() -> None:
    table = Table()
    table.row([(-1.0, table.column(1.0))], -0.5)
    with clock.limited(0.0):
        table.relax(1.0)
        assert clock.has_cut()


def test_what_other_tests_have_worked_counts_in_none() -> None:
    """Deadlines are points of work: after much of it nothing would be looked for any more."""
    with fixed_planning():
        clock.spend(1e6)
        with fixed_planning():
            assert clock.worked() == 0.0
        assert clock.worked() == 1e6
