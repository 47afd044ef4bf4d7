"""Plans of programs that repeat themselves: their figures are those of the unfolded plan, for any number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoremat.planner import solve, solving
from autoremat.planner.bounds.bounds import lower_bound
from autoremat.planner.bounds.repeated import repeated_bound
from autoremat.planner.repeated import plain_peak_of, solve_repeated
from autoremat.program import Abilities, InfeasibleBudget, Program, simulate, verify
from autoremat.program.repeats import Repeated, fold, unfold
from tests.planner.layers import recurrence, stack

MAKERS = {"stack": stack, "recurrence": recurrence}


def folded_of(name: str, times: int) -> Repeated:
    folded = fold(MAKERS[name](16))
    assert folded is not None
    return replace(folded, times=times)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("times", [16, 25, 64])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.43])
def test_the_figures_are_those_of_the_unfolded_plan(name: str, times: int, share: float) -> None:
    found = solve_repeated(folded_of(name, times), share)
    plan = found.unfold()
    timeline = simulate(plan.program, plan.schedule)
    assert timeline.peak_bytes == found.peak_bytes <= found.budget_bytes
    assert timeline.extra_seconds / plan.program.seconds == pytest.approx(found.overhead, abs=1e-12)
    assert simulate(plan.program).peak_bytes == found.plain_peak_bytes
    assert verify(plan.program, plan) == ()
    assert found.lower_bound <= found.overhead


@pytest.mark.parametrize("name", MAKERS)
def test_the_bound_is_below_every_plan_and_not_above_the_other_bound(name: str) -> None:
    folded = folded_of(name, 14)
    program = unfold(folded)
    budget = simulate(program).peak_bytes // 2
    bound = repeated_bound(folded, budget)
    assert 0 < bound <= solve(program, budget, solver="greedy", effort=0.02).overhead
    assert bound <= lower_bound(program, budget) + 1e-3


@pytest.mark.parametrize("name", MAKERS)
def test_few_repetitions_cost_about_what_the_search_finds(name: str) -> None:
    folded = folded_of(name, 40)
    plan = solve(unfold(folded), 0.5, effort=0.02)
    assert solve_repeated(folded, 0.5).overhead <= plan.overhead + 0.002


def test_a_million_repetitions_are_near_the_bound() -> None:
    found = solve_repeated(folded_of("stack", 1_000_000), 0.5)
    assert found.folded.ops == 4_000_001
    assert found.overhead - found.lower_bound < 0.005


def test_small_budgets_keep_what_crosses_between_groups() -> None:
    folded = folded_of("stack", 4096)
    found = solve_repeated(folded, 0.08)
    assert found.folded.times < 4096
    assert sum(span.count for span in found.spans) == found.folded.times
    assert found.peak_bytes <= 0.08 * plain_peak_of(folded)


def test_below_the_lowest_peak_the_error_names_it() -> None:
    with pytest.raises(InfeasibleBudget, match="at least") as caught:
        solve_repeated(folded_of("stack", 64), 600)
    found = solve_repeated(folded_of("stack", 64), caught.value.floor_bytes)
    assert found.peak_bytes == caught.value.floor_bytes


def test_solve_folds_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "_REPEATS", 100)
    program = unfold(folded_of("recurrence", 100))
    plan = solve(program, 0.5)
    known = fold(program)
    assert known is not None
    assert plan.solver == "repeated"
    assert plan.overhead == pytest.approx(solve_repeated(known, 0.5).overhead, abs=1e-12)
    assert verify(program, plan) == ()


def test_an_engine_that_runs_nothing_twice_gets_no_plan_that_does() -> None:
    folded = folded_of("stack", 40)
    once = replace(folded.program, abilities=Abilities(most_runs=1))
    with pytest.raises(InfeasibleBudget):
        solve_repeated(replace(folded, program=once), 0.5)


def test_a_plan_says_what_it_keeps() -> None:
    text = str(solve_repeated(folded_of("stack", 1000), 0.5))
    assert "1,000 repetitions" in text
    assert "extra time" in text


def test_the_same_plan_every_time() -> None:
    assert solve_repeated(folded_of("recurrence", 500), 0.4) == solve_repeated(folded_of("recurrence", 500), 0.4)


def test_nothing_to_fold_is_planned_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "_REPEATS", 1)
    values = stack(3)
    assert isinstance(values, Program)
    assert solve(values, 0.9).solver != "repeated"
