"""Plans under Inductor: within the budget as the allocator counts, or refused before anything runs."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch

import autoremat
from autoremat import InfeasibleBudget
from autoremat.engines.torch.compiled import session as sessions
from autoremat.engines.torch.compiled.partition import drawn_twice
from tests.engines.torch.compiled.cases import (
    GPT_DROPOUT,
    RESNET,
    Case,
    Regression,
    built,
    peak,
    plain,
    rows,
    same,
    train,
)
from tests.engines.torch.compiled.zoo import DECODER, LLAMA, UNET

pytestmark = pytest.mark.slow
SMALL = Case("MLP", lambda: Regression(0.3), lambda: rows(256))


@pytest.mark.guard
def test_dropout_within_the_budget() -> None:
    """The same bits as without a plan, the generator's state after the backward included; and no draw is repeated."""
    left = plain(SMALL, "inductor")
    torch._dynamo.reset()
    model, data = built(SMALL)
    call = torch.compile(autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1))
    halves = []

    def split(*args: object, **given: object) -> object:
        halves.append(real(*args, **given))
        return halves[-1]

    real = sessions.split
    with patch.object(sessions, "split", split):
        assert same(train(model, call, data), left)
    assert not any(drawn_twice(*both) for both in halves)
    stats = autoremat.stats(model)
    assert stats.plan is not None
    assert stats.executed_by == "inductor"
    assert stats.reruns > 0
    assert stats.scheduled_peak_bytes is not None
    assert stats.scheduled_peak_bytes <= stats.plan.budget_bytes
    taken = peak(model, call, data)
    assert taken <= stats.scheduled_peak_bytes <= 1.01 * taken


def test_the_generator_of_eager_training() -> None:
    with torch._inductor.config.patch(fallback_random=True):
        left = plain(SMALL, "inductor")
        torch._dynamo.reset()
        model, data = built(SMALL)
        call = torch.compile(autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1))
        assert same(train(model, call, data), left)


def test_a_budget_below_the_compiled_floor_is_refused_before_anything_runs() -> None:
    """And the floor that the error names is accepted."""
    model, data = built(SMALL)
    call = torch.compile(autoremat.checkpoint(model, budget=5_000, time_limit_seconds=1))
    before = torch.get_rng_state()
    with pytest.raises(InfeasibleBudget, match="once Inductor has fused it") as error:
        call(*data)
    assert torch.equal(torch.get_rng_state(), before)
    torch._dynamo.reset()
    model, data = built(SMALL)
    call = torch.compile(autoremat.checkpoint(model, budget=error.value.floor_bytes, time_limit_seconds=1))
    train(model, call, data)
    assert peak(model, call, data) <= error.value.floor_bytes


def test_float64_agrees_with_eager() -> None:
    torch.manual_seed(0)
    model = Regression().double()
    x, y = (t.double() for t in rows(64))
    eager = train(copy.deepcopy(model), model, (x, y), steps=1)[:1]
    plainly = copy.deepcopy(model)
    plainly(x, y).backward()
    call = torch.compile(autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1))
    model.zero_grad(set_to_none=True)
    assert torch.allclose(call(x, y).detach(), eager[0], rtol=1e-10, atol=0)
    call(x, y).backward()
    model.zero_grad(set_to_none=True)
    call(x, y).backward()
    for mine, theirs in zip(model.parameters(), plainly.parameters(), strict=True):
        assert float((mine.grad - theirs.grad).abs().max()) <= 1e-10 * float(theirs.grad.abs().max())  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("case", [GPT_DROPOUT, RESNET, UNET, LLAMA, DECODER], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.8, 0.65, 0.5, 0.35])
def test_within_the_budget_or_refused(case: Case, share: float) -> None:
    model, data = built(case)
    call = torch.compile(autoremat.checkpoint(model, budget=share, time_limit_seconds=1))
    refused = None
    try:
        train(model, call, data, steps=1)
    except InfeasibleBudget as error:
        refused = error
    stats = autoremat.stats(model)
    plan = stats.plan
    assert (plan is None) == (refused is not None)
    if refused is not None:
        assert refused.floor_bytes > refused.budget_bytes
    if plan is not None:
        assert stats.scheduled_peak_bytes is not None
        assert stats.scheduled_peak_bytes <= plan.budget_bytes
        taken = peak(model, call, data)
        assert taken <= stats.scheduled_peak_bytes <= 1.02 * taken
