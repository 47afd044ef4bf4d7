"""Plans under ``aot_eager``: the same bits as without a plan, and the peak that was foretold."""

from __future__ import annotations

import pytest
import torch

import autoremat
from autoremat import InfeasibleBudget, verify
from autoremat.program import Plan
from tests.engines.torch.compiled.cases import (
    AUTOCAST,
    GPT_DROPOUT,
    IN_PLACE,
    MLP,
    RESNET,
    Case,
    built,
    peak,
    plain,
    same,
    train,
)

NEAR_BYTES = 64
"""Numbers that autograd makes beside what the graph makes: the gradient of the loss."""


def planned(case: Case, budget: int | float) -> tuple[Plan, list[torch.Tensor], int]:
    """A training within a budget: its plan, what it leaves, its measured peak."""
    torch._dynamo.reset()
    model, data = built(case)
    call = torch.compile(autoremat.checkpoint(model, budget=budget, time_limit_seconds=1), backend="aot_eager")
    left = train(model, call, data)
    plan = autoremat.stats(model).plan
    assert plan is not None
    assert not verify(plan.program, plan)
    return plan, left, peak(model, call, data)


def floor_of(case: Case) -> int:
    torch._dynamo.reset()
    model, data = built(case)
    call = torch.compile(autoremat.checkpoint(model, budget=1000, time_limit_seconds=1), backend="aot_eager")
    with pytest.raises(InfeasibleBudget) as error:
        call(*data)
    return error.value.floor_bytes


CASES = [
    GPT_DROPOUT, RESNET, *(pytest.param(c, marks=pytest.mark.slow) for c in (MLP, IN_PLACE, AUTOCAST))
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_and_the_peak_that_was_foretold(case: Case) -> None:
    """At the floor and above it; the floor's plan runs some ops three times or more, where that pays."""
    left, floor = plain(case), floor_of(case)
    for budget in (floor, 0.8):
        plan, got, measured = planned(case, budget)
        assert same(got, left)
        assert plan.peak_bytes <= plan.budget_bytes
        assert measured <= plan.peak_bytes
        assert case.has_scratch or plan.peak_bytes - measured <= NEAR_BYTES
        assert any(n > 1 for n in plan.schedule.runs_of.values())


GUARDING = [pytest.param(c, marks=pytest.mark.guard) for c in (GPT_DROPOUT, RESNET, MLP)]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*GUARDING, IN_PLACE, AUTOCAST], ids=str)
def test_at_five_budgets(case: Case) -> None:
    left, floor = plain(case), floor_of(case)
    full = planned(case, 1.0)[0].plain_peak_bytes
    for k in range(5):
        plan, got, measured = planned(case, floor + k * (full - floor) // 4)
        assert same(got, left)
        assert measured <= plan.peak_bytes <= plan.budget_bytes
        assert case.has_scratch or plan.peak_bytes - measured <= NEAR_BYTES
