"""Graphs of the literature, forward nodes then backward nodes, all of which may run again: plans close to the bound."""

from __future__ import annotations

import pytest

from autoremat import solve, verify
from benchmarks.training_graphs import NETWORKS, training_graph

SMALL = ("FCN-8", "layered 35")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("share", [0.9, 0.8])
def test_the_gap_is_small(name: str, share: float) -> None:
    program = training_graph(name, NETWORKS[name]())
    plan = solve(program, share)
    assert verify(program, plan) == ()
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.overhead - plan.lower_bound <= {"layered 35": 0.015}.get(name, 0.005)


@pytest.mark.slow
@pytest.mark.real_seconds
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - set(SMALL)))
def test_the_gap_of_the_others_is_small(name: str) -> None:
    program = training_graph(name, NETWORKS[name]())
    plan = solve(program, 0.8, time_limit_seconds=30)
    assert verify(program, plan) == ()
    assert plan.overhead - plan.lower_bound <= 0.005
