"""What a rerun takes beside its kernels is part of a plan."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import autoremat
from autoremat.engines.torch.eager import rerun_cost
from autoremat.engines.torch.eager.rerun_cost import rerun_cost_seconds
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.program import Plan


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reruns take a second each beside their kernels."""
    monkeypatch.setattr(rerun_cost, "_rerun_seconds", lambda x: 1.0)
    monkeypatch.setattr(rerun_cost, "_kernel_seconds", lambda x: 0.0)
    rerun_cost_seconds.cache_clear()
    yield
    rerun_cost_seconds.cache_clear()


def of_many_small_and_one_large(x: Tensor, weight: Tensor) -> Tensor:
    """Four small results, each soon computed, and one of their size that takes a matrix product."""
    for _ in range(4):
        x = x.tanh()
    a, b = x.chunk(2)
    small = [torch.sigmoid(t) for t in (*a.chunk(2), *b.chunk(2))]
    return torch.cat([*small, torch.sigmoid(x @ weight)]).square().sum()


def planned(timing: str) -> Plan:
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    whole = autoremat.plan(of_many_small_and_one_large, x, weight, budget=1.0, timing=timing)
    return autoremat.plan(of_many_small_and_one_large, x, weight, budget=whole.plain_peak_bytes - 16384, timing=timing)


def n_reruns(plan: Plan) -> int:
    return len(plan.schedule.order) - len(plan.program.ops)


def test_every_call_of_a_measured_program_begins_with_it(dear: None) -> None:
    plan = planned("measure")
    forward = [op for op in plan.program.ops if op.phase == "forward" and op.kind == "op"]
    assert {op.call for op in forward} == {op.call for op in forward if op.again_seconds > 1}
    assert len({op.call for op in forward}) == sum(op.again_seconds > 1 for op in forward)
    assert all(op.rerun_seconds is None for op in plan.program.ops if op.phase == "backward")
    assert plan.schedule.extra_seconds(plan.program) >= n_reruns(plan) > 0


def test_estimates_are_the_same_on_every_machine(dear: None) -> None:
    assert all(op.rerun_seconds is None for op in planned("estimate").program.ops)


@pytest.mark.real_seconds
def test_measuring_it_takes_no_memory_in_a_step() -> None:
    """It was measured when the first step was planned, and took 16 MiB."""
    rerun_cost_seconds.cache_clear()
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    step = autoremat.checkpoint(of_many_small_and_one_large, budget="70%")
    peak = account(lambda: step(x, weight).backward(), resident(x, weight)).peak_bytes
    assert peak < 1 << 20


@pytest.mark.real_seconds
def test_it_is_some_microseconds() -> None:
    rerun_cost_seconds.cache_clear()
    assert 1e-6 < rerun_cost_seconds() < 1e-2
