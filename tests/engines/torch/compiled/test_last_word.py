"""A measured step has the last word; the optimizer's step is in the account."""

from __future__ import annotations

import pytest
import torch

import autoremat
from autoremat.engines.torch.compiled.last_word import LastWord
from autoremat.engines.torch.compiled.stored import PlannedGraph
from tests.engines.torch.compiled.cases import MLP, Regression, built, clear, peak, plain, rows, same, train


@pytest.mark.slow
@pytest.mark.guard
def test_the_measured_peak_is_that_of_the_plan() -> None:
    model, data = built(MLP)
    autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1, measure=True)
    train(model, torch.compile(model, backend="aot_eager"), data, steps=3)
    stats = autoremat.stats(model)
    assert stats.plan is not None
    assert stats.measured_peak_bytes is not None
    assert stats.plan.peak_bytes - 64 <= stats.measured_peak_bytes <= stats.plan.peak_bytes
    assert (stats.calls, stats.planned, stats.fallbacks) == (3, 1, 0)


def test_a_step_that_takes_more_is_planned_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the allocator had been asked for a little more than the budget."""
    left = plain(MLP)
    torch._dynamo.reset()
    model, data = built(MLP)
    ended = LastWord._ended

    def more(self: LastWord, graph: PlannedGraph, above: int) -> None:
        ended(self, graph, graph.plan.budget_bytes * 103 // 100 - graph.plan.program.fixed_bytes)

    monkeypatch.setattr(LastWord, "_ended", more)
    autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1, measure=True)
    call = torch.compile(model, backend="aot_eager")
    train(model, call, data)
    with pytest.warns(RuntimeWarning, match="beyond the budget of .*; the next one is planned with that margin"):
        first = autoremat.stats(model).plan
    monkeypatch.undo()
    clear(model)
    assert same(train(model, call, data), left)
    second = autoremat.stats(model).plan
    assert first is not None
    assert second is not None
    assert second.budget_bytes == first.budget_bytes
    assert second.peak_bytes < 0.98 * first.peak_bytes
    assert peak(model, call, data) <= second.peak_bytes


@pytest.mark.slow
@pytest.mark.guard
def test_the_step_of_the_optimizer_is_in_the_account() -> None:
    torch.manual_seed(0)
    model = Regression()
    adam = torch.optim.Adam(model.parameters())
    plans = [
        autoremat.plan(model, *rows(), budget=1.0, compiled="aot_eager", optimizer=o, time_limit_seconds=1)
        for o in (None, adam)
    ]
    more = sum(v.nbytes for v in plans[1].program.values if v.kind == "optimizer")
    assert more >= 2 * sum(p.nbytes for p in model.parameters())
    assert plans[1].program.fixed_bytes == plans[0].program.fixed_bytes + more
    assert plans[1].program.ops[-1].kind == "step"
    autoremat.checkpoint(model, budget=1.0, optimizer=adam, time_limit_seconds=1)
    torch.compile(model, backend="aot_eager")(*rows()).backward()
    adam.step()
    assert autoremat.stats(model).plan.program.ops[-1].scratch_bytes > 0  # type: ignore[union-attr]
