"""Retention intervals: exact under changes, whatever comes and goes; what annealing makes of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoremat.planner.search.annealing import Annealing, Course
from autoremat.planner.search.retention import Retention
from autoremat.planner.search.tiny import cheapest
from autoremat.program import Once, Op, Program, Schedule, Value, simulate
from benchmarks.layered import layered_graph
from tests.fixed import examples
from tests.planner.random_graphs import graph
from tests.strategies import programs


def never() -> bool:
    return False


def schedule_of(program: Program, state: Retention) -> Schedule:
    return Schedule.from_order(program, [k % state.n for k in state.keys])


def changed(state: Retention, dice: random.Random, steps: int) -> None:
    """Add and remove runs at random."""
    for _ in range(steps):
        there = state.again.keys
        if there and dice.random() < 0.4:
            state.remove(dice.choice(there))
            state.settle()
            continue
        late = dice.randrange(1, state.n)
        key = late * state.n + dice.randrange(late)
        if key not in there and late > state.facts.after[key % state.n]:
            state.add(key)
            state.settle()


@examples(80)
@given(program=programs(max_ops=8), seed=st.integers(0, 1000), budget=st.integers(0, 200))
def test_bytes_are_the_simulators_after_any_change(program: Program, seed: int, budget: int) -> None:
    """Also where ops overwrite in place, have scratch, write several values, or something holds them."""
    assume(len(program.ops) > 1 and not program.has_calls and program.abilities.reruns == "anywhere")
    state, dice = Retention(program, budget), random.Random(seed)
    for _ in range(12):
        changed(state, dice, 2)
        timeline = simulate(program, schedule_of(program, state))
        assert (state.over + budget).tolist() == list(timeline.resident_bytes)
        assert state.extra_seconds == pytest.approx(timeline.extra_seconds, abs=1e-9)
        assert state.peak_bytes == timeline.peak_bytes
        assert state.runs == sorted(divmod(k, state.n) for k in state.keys if state.is_again(k))
        assert state.excess_bytes == sum(max(0, nbytes - budget) for nbytes in timeline.resident_bytes)


def test_bytes_are_exact_on_a_large_graph_too_and_nothing_is_left_of_what_is_taken_back() -> None:
    program = layered_graph(100, 3)
    state, plain = Retention(program), Retention(program)
    changed(state, random.Random(1), 400)
    assert len(state.again.keys) > 50
    assert state.over.tolist() == list(simulate(program, schedule_of(program, state)).resident_bytes)
    for key in tuple(state.again.keys):
        state.remove(key)
        state.settle()
    assert state.over.tolist() == plain.over.tolist()
    assert state.accesses == plain.accesses


@examples(60)
@given(program=programs(max_ops=8), seed=st.integers(0, 1000), budget=st.integers(0, 200))
def test_a_draft_says_what_it_would_do_and_leaves_nothing_behind(program: Program, seed: int, budget: int) -> None:
    """Of several runs at once, some added and some taken back, the same one twice among them."""
    assume(len(program.ops) > 1 and not program.has_calls and program.abilities.reruns == "anywhere")
    state, dice = Retention(program, budget), random.Random(seed)
    changed(state, dice, 4)
    for _ in range(6):
        over, accesses, excess = state.over.tolist(), [list(found) for found in state.accesses], state.excess_bytes
        there = set(state.again.keys)
        for _ in range(dice.randint(1, 4)):
            late = dice.randrange(1, state.n)
            key = late * state.n + dice.randrange(late)
            if key in there:
                state.remove(key)
            elif late > state.facts.after[key % state.n]:
                state.add(key)
            there ^= {key} if late > state.facts.after[key % state.n] else set()
        foretold = state.excess_change()
        if dice.random() < 0.5:
            state.take_back()
            assert (state.over.tolist(), state.accesses, state.excess_bytes) == (over, accesses, excess)
        else:
            state.settle()
            assert state.excess_bytes == excess + foretold
            assert set(state.again.keys) == there
            assert (state.over + budget).tolist() == list(simulate(program, schedule_of(program, state)).resident_bytes)


def test_a_copy_with_runs_leaves_the_start_as_it_is() -> None:
    program = layered_graph(40, 1)
    plain = Retention(program)
    changed(other := plain.with_runs([], 100), random.Random(2), 60)
    again = plain.with_runs(other.runs, 100)
    assert again.over.tolist() == other.over.tolist()
    assert again.accesses == other.accesses
    assert plain.over.tolist() == Retention(program).over.tolist()
    assert not plain.again.keys
    assert other.again.keys


def test_what_is_overwritten_or_held_or_runs_once_does_not_run_again() -> None:
    values = (*(Value(v, 8) for v in "abcd"), Value("e", 8, held=4))
    ops = (
        Op("once", (), (0,), once=Once.GIVEN),
        Op("overwritten", (0,), (1,)),
        Op("in place", (1,), (2,), in_place=((2, 1),)),
        Op("free", (2,), (3,)),
        Op("held", (3,), (4,)),
        Op("last", (4,), ()),
    )
    assert Retention(Program("", values, ops)).facts.after == (6, 6, 6, 3, 4, 6)


# -- annealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_is_taken_back_leaves_nothing_behind(seed: int) -> None:
    program = layered_graph(60, seed)
    plain = Retention(program)
    state = plain.with_runs([], int(0.8 * plain.peak_bytes))
    found = Annealing(state, Course(2000, seed)).run(never)
    assert found.steps == 2000
    fresh = plain.with_runs(state.runs, state.budget_bytes)
    assert state.over.tolist() == fresh.over.tolist()
    assert state.accesses == fresh.accesses
    assert state.extra_seconds == pytest.approx(fresh.extra_seconds)


def test_what_annealing_finds_is_within_the_budget_and_the_same_every_time() -> None:
    program = layered_graph(100, 1)
    plain = Retention(program)
    budget = int(0.85 * plain.peak_bytes)
    first, second = (Annealing(plain.with_runs([], budget), Course(8000)).run(never) for _ in range(2))
    assert first == second
    assert first.runs is not None
    timeline = simulate(program, schedule_of(program, plain.with_runs(first.runs, budget)))
    assert timeline.peak_bytes <= budget
    assert timeline.extra_seconds == pytest.approx(first.extra_seconds)


@pytest.mark.slow
@pytest.mark.guard
def test_annealing_finds_the_cheapest_schedules_of_small_graphs() -> None:
    """Of four in five budgets, from four starts; Dijkstra's algorithm over all schedules is the judge."""
    best = looked_at = 0
    for seed in range(12):
        program = graph(seed, 10)
        plain = Retention(program)
        for share in (0.95, 0.85, 0.75):
            budget = int(share * plain.peak_bytes)
            optimum = cheapest(program, budget)
            if optimum is None:
                continue
            starts = (Annealing(plain.with_runs([], budget), Course(2000, k)) for k in range(4))
            found = min(start.run(never).extra_seconds for start in starts)
            cost = optimum.extra_seconds(program)
            assert found >= cost - 1e-9
            looked_at += 1
            best += found <= cost + 1e-9
    assert looked_at >= 10
    assert best >= 0.8 * looked_at
