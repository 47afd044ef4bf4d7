"""Backward passes under vmap: reruns are made outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat

WIDTH = 16


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = x + F.dropout(F.gelu(norm(linear(x))), 0.3)
        return x[:, :2].sum(0)


def by_autograd(y: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad(y, [weight], torch.eye(2), is_grads_batched=True)[0]


def by_vmap(y: Tensor, weight: Tensor) -> Tensor:
    return torch.vmap(lambda v: torch.autograd.grad(y, [weight], v, retain_graph=True)[0])(torch.eye(2))


@pytest.mark.parametrize("jacobian", [by_autograd, by_vmap])
def test_the_jacobian_is_that_of_plain_training(jacobian: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Random calls were rerun within vmap, which refuses them."""
    found = []
    for budget in (None, "55%"):
        torch.manual_seed(0)
        model = Network()
        call = model if budget is None else autoremat.checkpoint(model, budget=budget)
        for _ in range(3):
            found.append(jacobian(call(torch.randn(1024, WIDTH)), model.linears[1].weight))
        found.append(torch.get_rng_state())
    assert autoremat.stats(call).reruns
    for plain, mine in zip(found[:4], found[4:], strict=True):
        assert torch.equal(plain, mine)


def test_vmap_goes_on_behind_a_rerun() -> None:
    """Its level is put back, so that what comes after it is mapped as before."""
    model = Network()
    call = autoremat.checkpoint(model, budget="55%")
    for _ in range(3):
        y = call(torch.randn(1024, WIDTH))
        rows = torch.vmap(
            lambda v, y=y: torch.autograd.grad(y, [model.linears[1].weight], v, retain_graph=True)[0] * v[0]
        )
        assert not rows(torch.eye(2))[1].any()
    assert torch._C._functorch.peek_interpreter_stack() is None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grad * x


def test_code_of_the_user_that_cannot_be_recorded_runs_as_in_plain_training() -> None:
    """What takes part under vmap cannot be made on fake tensors: the first step ended with an error of ours."""
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        for _ in range(4):
            x = Square.apply((x @ weight).tanh().sin())
        return x[:, :2].sum(0)

    call = autoremat.checkpoint(forward, budget="80%")
    for k in range(3):
        x = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(k))
        assert torch.equal(by_autograd(call(x), weight), by_autograd(forward(x), weight))
