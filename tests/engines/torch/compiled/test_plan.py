"""``plan(..., compiled=...)``: what a compiled step would take, before anything runs."""

from __future__ import annotations

import pytest
import torch

import autoremat
from autoremat import InfeasibleBudget, Plan, verify
from tests.engines.torch.compiled.cases import GPT_DROPOUT, MLP, Broken, built, peak, rows


@pytest.mark.slow
@pytest.mark.guard
def test_the_plan_that_the_step_follows() -> None:
    model, data = built(MLP)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    plan = autoremat.plan(model, *data, budget=0.8, compiled="aot_eager", time_limit_seconds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not verify(plan.program, plan)
    torch._dynamo.reset()
    call = torch.compile(autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1), backend="aot_eager")
    assert plan.peak_bytes - 64 <= peak(model, call, data) <= plan.peak_bytes
    followed = autoremat.stats(model).plan
    assert followed is not None
    assert followed.schedule == plan.schedule
    assert Plan.from_json(plan.to_json()).schedule == plan.schedule


def test_names_that_a_user_knows() -> None:
    model, data = built(GPT_DROPOUT)
    plan = autoremat.plan(model, *data, budget=1.0, compiled="aot_eager", time_limit_seconds=1)
    program = plan.program
    assert {"model.token.weight", "model.head.weight", "model.head.weight.grad", "args.0"} <= {
        v.id for v in program.values
    }
    assert {v.kind for v in program.values} >= {"parameter", "input", "gradient", "activation", "temporary"}
    assert {op.module for op in program.ops} >= {"model.blocks.0.mlp.0", "model.head"}
    assert all(op.source.split(":")[0].endswith(("models.py", "cases.py")) for op in program.ops if op.source)
    assert "model.blocks.0-1" in str(autoremat.explain(plan))


@pytest.mark.slow
def test_inductor_generates_no_code() -> None:
    model, data = built(MLP)
    torch._inductor.metrics.reset()
    plan = autoremat.plan(model, *data, budget=0.8, compiled=True, time_limit_seconds=1)
    assert torch._inductor.metrics.generated_kernel_count == 0
    assert "the engine orders runs" in str(plan)
    torch._dynamo.reset()
    call = torch.compile(autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1))
    assert peak(model, call, data) <= plan.budget_bytes


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"several graphs(.|\n)*graph_break"):
        autoremat.plan(Broken(), *rows(), budget=0.8, compiled="aot_eager")
    with pytest.raises(ValueError, match="nothing that requires grad"):
        autoremat.plan(torch.sin, torch.randn(4), budget=0.8, compiled="aot_eager")
    with pytest.raises(ValueError, match="not built on AOTAutograd"):
        autoremat.plan(Broken(), *rows(), budget=0.8, compiled="eager")
    model, data = built(MLP)
    with pytest.raises(InfeasibleBudget, match="smallest known peak"):
        autoremat.plan(model, *data, budget=1000, compiled="aot_eager", time_limit_seconds=1)
