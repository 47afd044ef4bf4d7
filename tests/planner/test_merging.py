"""Merging: the cheapest set of further runs among those of several plans, by an integer program."""

from __future__ import annotations

import random
from itertools import combinations
from math import inf

import pytest

from autoremat import solve
from autoremat.planner.search.annealing import Annealing, Course
from autoremat.planner.search.merging import merged
from autoremat.planner.search.retention import Retention, Runs
from autoremat.program import Program, Schedule, simulate
from benchmarks.layered import layered_graph
from tests.planner.random_graphs import graph


def simulated(program: Program, runs: Runs) -> tuple[int, float]:
    """Peak and extra seconds of further runs, by the simulator."""
    n = len(program.ops)
    keys = sorted([*(late * n + i for late, i in runs), *(i * (n + 1) for i in range(n))])
    timeline = simulate(program, Schedule.from_order(program, [key % n for key in keys]))
    return timeline.peak_bytes, timeline.extra_seconds


def some_runs(program: Program, dice: random.Random, count: int) -> Runs:
    """Further runs at which what they read has been made."""
    after = Retention(program).facts.after
    able = [(late, i) for i, least in enumerate(after) for late in range(least + 1, len(after))]
    return dice.sample(able, min(count, len(able)))


@pytest.mark.parametrize("seed", range(20))
def test_nothing_among_the_further_runs_is_cheaper(seed: int) -> None:
    """All subsets of a few further runs, by the simulator, are the judge."""
    program, dice = graph(seed, 10), random.Random(seed)
    pool = some_runs(program, dice, 9)
    plain = Retention(program).peak_bytes
    for share in (0.95, 0.85, 0.75):
        budget = int(share * plain)
        costs = [
            seconds
            for k in range(len(pool) + 1)
            for runs in combinations(pool, k)
            for peak, seconds in [simulated(program, list(runs))]
            if peak <= budget
        ]
        state = Retention(program).with_runs([], budget)
        found = merged(program, state, [pool[:5], pool[4:]], inf, inf)
        if not costs:
            assert found is None
        else:
            assert found is not None
            peak, seconds = simulated(program, found)
            assert peak <= budget
            assert seconds == pytest.approx(min(costs), abs=1e-6)


def test_merged_plans_are_better_than_each_of_them() -> None:
    program = layered_graph(100, 1)
    budget = int(0.75 * simulate(program).peak_bytes)
    state, found = Retention(program).with_runs([], budget), []
    for seed in range(4):
        annealed = Annealing(state.with_runs([], budget), Course(steps=10_000, seed=seed)).run(lambda: False)
        if annealed.runs is not None:
            found.append((annealed.extra_seconds, annealed.runs))
    found.sort()
    runs = merged(program, state, [runs for _, runs in found], found[0][0], inf)
    assert runs is not None
    peak, seconds = simulated(program, runs)
    assert peak <= budget
    assert seconds < found[0][0]
    assert merged(program, state, [runs for _, runs in found], seconds, inf) is None


def test_without_work_nothing_is_merged() -> None:
    program = layered_graph(100, 1)
    budget = int(0.75 * simulate(program).peak_bytes)
    state = Retention(program).with_runs([], budget)
    assert merged(program, state, [[(50, 3)], [(60, 4)]], inf, 0.0) is None


@pytest.mark.slow
def test_a_graph_near_its_floor_is_planned_close_to_its_bound() -> None:
    """2.4 points above it before, with as much work."""
    plan = solve(layered_graph(250, 2), 0.8, effort=1.0, time_limit_seconds=1e6)
    assert plan.peak_bytes <= plan.budget_bytes
    assert 0 < plan.overhead - plan.lower_bound < 0.012
