"""Views that a custom Function returns: they get their history when it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import measured_peak


class Reversed(torch.autograd.Function):
    """Gives its input, and gradients the other way round, as where a classifier is to be misled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def hooked(modules: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """Hooks on a module's backward put views between."""
    modules[6].register_full_backward_hook(lambda module, inner, outer: None)
    return lambda x: x


@pytest.mark.parametrize(
    "between", [lambda modules: Reversed.apply, hooked], ids=["reversed gradients", "backward hook"]
)
def test_what_lies_before_such_a_view_is_in_the_plan(
    between: Callable[[nn.Sequential], Callable[[Tensor], Tensor]],
) -> None:
    torch.manual_seed(0)
    modules = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.GELU())))
    middle, x = between(modules), torch.randn(512, 64)

    def step(x: Tensor) -> Tensor:
        return modules[6:](middle(modules[:6](x))).square().mean()

    plan = autoremat.plan(step, x, budget=1.0)
    assert plan.plain_peak_bytes == measured_peak(lambda: step(x).backward(), modules, x)
    budget = int(1.02 * plan.floor_bytes)
    assert budget < 0.5 * plan.plain_peak_bytes
    call = autoremat.checkpoint(step, budget=budget)
    for _ in range(3):
        modules.zero_grad()
        assert measured_peak(lambda: call(x).backward(), modules, x) <= budget
