"""rotor with a third choice: it is rotor where lending is too dear; how far plans for chains are from the optimum."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import solve
from autoremat.planner.bounds.linked import linked_floor_bound
from autoremat.planner.search.chain import chain_of
from autoremat.planner.search.demand import demand_of
from autoremat.planner.search.lending import Lending, lent_schedules
from autoremat.planner.search.tables import tables_of
from autoremat.planner.solvers.rotor import Table
from autoremat.planner.solvers.rotor import schedule as rotor
from autoremat.program import InfeasibleBudget, Link, Program, simulate, verify
from tests.fixed import examples
from tests.planner.brute_force_link import optimum_with_link
from tests.planner.chains import gpt, steps, uniform_steps
from tests.planner.random_programs import steps as random_steps


def uneven(n: int, dice: random.Random) -> Program:
    sizes, seconds = ([dice.randint(1, 9) for _ in range(n)] for _ in range(2))
    link = Link(dice.choice((0.5, 1.0, 2.0)), 1.0)
    return replace(steps(sizes, [float(s) for s in seconds], grad_bytes=dice.randint(0, 3)), link=link)


def table_of(program: Program, share: float) -> tuple[Table, Lending, Lending]:
    """The tables for a share of the plain peak: rotor's, and those with lending for nothing, and too dear."""
    chain = chain_of(tables_of(program))
    table = Table(demand_of(chain), int(share * simulate(program).peak_bytes), 100)
    return table, Lending(table, chain, 0.0), Lending(table, chain, 1e12)


@pytest.mark.parametrize("program", [uniform_steps(9), gpt(3, vocabulary=256), uneven(8, random.Random(3))])
def test_where_lending_is_too_dear_it_is_rotor_and_where_it_is_free_it_is_never_worse(program: Program) -> None:
    table, free, dear = table_of(program, 1.2)
    feasible = np.isfinite(table.first)
    assert np.array_equal(dear.first[feasible], table.first[feasible])
    assert (dear.first[~feasible] > 1e9).all()
    assert (free.first <= table.first).all()
    assert (free.first < table.first).any()
    assert dear.walk(table.limits()[-1]) is not None
    for limit in table.limits():
        walk = dear.walk(limit)
        assert walk is not None
        assert walk.values == frozenset()
        assert list(table.sweeps_of(walk.left)) == list(table.sweeps(limit))


def test_over_a_fast_link_states_are_lent_in_place_of_reruns() -> None:
    program = replace(uniform_steps(16), link=Link(1e6, 1e6))
    budget = int(0.5 * simulate(program).peak_bytes)
    assert simulate(program, rotor(replace(program, link=None), budget)).extra_seconds >= 7
    best = simulate(program, lent_schedules(program, budget)[0])
    assert best.extra_seconds == 0
    assert best.sent_bytes > 0
    assert best.peak_bytes <= budget


@examples(25)
@given(program=random_steps(), rate=st.sampled_from((0.5, 20.0, 1e6)), share=st.floats(0.3, 1))
def test_every_schedule_is_within_the_budget_and_can_be_carried_out(
    program: Program, rate: float, share: float
) -> None:
    linked = replace(program, link=Link(rate, rate, 0.01))
    budget = int(share * simulate(program).peak_bytes)
    for schedule in lent_schedules(linked, budget):
        assert verify(linked, schedule, budget_bytes=budget) == ()


def distances(seeds: range, n: int) -> list[float]:
    """How far plans for random chains are from the cheapest of all schedules, as shares of the step."""
    found = []
    for seed in seeds:
        program = uneven(n, random.Random(seed))
        low, high = linked_floor_bound(program), simulate(program).peak_bytes
        for budget in sorted({low + (high - low) * k // 3 for k in range(3)}):
            best = optimum_with_link(program, budget)
            try:
                plan = solve(program, budget, effort=0.02)
            except InfeasibleBudget:
                assert best is None
                continue
            assert best is not None
            found.append(plan.overhead - best / program.seconds)
    return found


def test_plans_for_tiny_chains_are_the_optimum() -> None:
    gaps = distances(range(5), 3)
    assert len(gaps) > 5
    assert min(gaps) > -1e-9
    assert sum(gap < 1e-9 for gap in gaps) == len(gaps)


@pytest.mark.slow
def test_plans_for_small_chains_are_mostly_the_optimum() -> None:
    gaps = distances(range(6, 9), 4)
    assert min(gaps) > -1e-9
    assert sum(gap < 1e-9 for gap in gaps) >= 0.8 * len(gaps)
