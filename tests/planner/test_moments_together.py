"""The linear program of several moments: what looking at some stages at once adds, and that it is never too much."""

from __future__ import annotations

from math import inf

import pytest

from autoremat.planner import clock
from autoremat.planner.bounds.bounds import closer_bound
from autoremat.planner.bounds.stages import Stages
from autoremat.planner.search.tiny import cheapest
from autoremat.program import Program, simulate
from benchmarks.layered import layered_graph
from tests.planner.random_graphs import graph


def relaxed(program: Program, budget_bytes: int, windows: int, every: int = 0) -> float:
    """Seconds that the relaxation of all moments needs; with windows of so many stages, and looks at all later ones."""
    n = len(program.ops)
    stages = Stages(program, budget_bytes, range(n), unit_seconds=program.seconds / 1e4)
    for w in range(1, n if windows else 0):
        stages.since(w, min(w + windows, n) - 1)
    for w in range(every, n if every else 0, every or 1):
        stages.since(w)
    found = stages.table.relax(inf)
    assert found is not None
    return found.cost * stages.unit_seconds


@pytest.mark.parametrize("seed", range(6))
def test_a_few_stages_together_say_more_and_never_too_much(seed: int) -> None:
    """Dijkstra's algorithm over all schedules is the judge."""
    program = graph(seed, 9)
    for share in (0.9, 0.8, 0.7):
        budget = int(share * simulate(program).peak_bytes)
        optimum = cheapest(program, budget)
        if optimum is not None:
            cost = optimum.extra_seconds(program)
            alone, together = relaxed(program, budget, 0), relaxed(program, budget, 4, every=3)
            assert alone - 1e-9 <= together <= cost + 1e-6


def test_they_say_more_where_ops_run_again_along_the_way() -> None:
    program = layered_graph(40, 2)
    budget = int(0.75 * simulate(program).peak_bytes)
    looks, windows = relaxed(program, budget, 0, every=3), relaxed(program, budget, 4, every=3)
    assert windows > 1.01 * looks > 0


def test_more_work_makes_the_bound_of_a_graph_without_a_backward_closer() -> None:
    program = layered_graph(100, 1)
    budget = int(0.75 * simulate(program).peak_bytes)
    little, more = (closer_bound(program, budget, [0], deadline=clock.worked() + work) for work in (0.05, 1.0))
    assert more > 0.13  # as the linear program says at the moments at which memory binds
    assert 0 < little < more < 0.1581  # which is the cheapest plan that is known
