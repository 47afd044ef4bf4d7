"""Attacks on steps off their recorded path and on forwards that are tried again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat

WIDTH = 32

pytestmark = pytest.mark.filterwarnings("ignore:autoremat")


class Net(nn.Module):
    """Layers with something between them that takes the layer's number and output; ``odd`` leaves the path."""

    def __init__(self, between: Callable[[nn.Module, int, Tensor], Tensor], n: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n))
        self.between, self.odd, self.failures = between, False, 0

    def forward(self, x: Tensor) -> Tensor:
        for k, layer in enumerate(self.layers):
            x = self.between(self, k, layer(x).tanh())
            x = x * 1.5 + 0.1 if self.odd and k == 0 else x
            if k == 4 and self.failures and not torch._guards.detect_fake_mode((x,)):
                self.failures -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return x.square().mean()


def step(model: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(x)
    loss.backward()
    numbers = [*(p.grad for p in model.parameters()), *model.buffers()]
    return [loss.detach(), *(t.clone() for t in numbers if t is not None)]


def floor_of(model: nn.Module, x: Tensor) -> int:
    try:
        autoremat.plan(model, x, budget=1, timing="estimate", time_limit_seconds=0.1)
    except autoremat.InfeasibleBudget as error:
        return error.floor_bytes
    raise AssertionError("must be infeasible")


def test_numpy_writes_into_what_is_made_off_the_path() -> None:
    """The recording has seen NumPy write; off the path, too, nothing is computed again that it has written."""

    def between(model: nn.Module, k: int, h: Tensor) -> Tensor:
        y = h * 2
        if k > 1:
            y.detach().numpy()[:, ::2] *= 0.5
        return y.sin() * h.cos()

    torch.manual_seed(0)
    x, plain = torch.randn(256, WIDTH), Net(between)
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=floor_of(plain, x) + 2000, time_limit_seconds=0.1)
    step(model, x)
    step(model, x)
    plain.odd = model.odd = True
    assert all(map(torch.equal, step(model, x), step(plain, x)))
    stats = autoremat.stats(model)
    assert stats.deviations == 1
    assert stats.reruns > 0


def moving_average(model: nn.Module, k: int, h: Tensor) -> Tensor:
    """A buffer that is replaced, not overwritten."""
    if k == 1:
        model.register_buffer("mean", 0.9 * getattr(model, "mean", torch.zeros(WIDTH)) + 0.1 * h.detach().mean(0))
    return h.sin().exp()


def its_own_backward(model: nn.Module, k: int, h: Tensor) -> Tensor:
    """The forward gives a parameter its gradient."""
    if k == 1:
        model.layers[5].weight.square().sum().backward()  # type: ignore[index]
    return h.sin().exp()


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        doubled: Tensor = torch.ops.autoremat_attack.double(x)
        return doubled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


LIBRARY = torch.library.Library("autoremat_attack", "DEF")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.impl("double", lambda x: x * 2, "CPU")
LIBRARY.impl("double", torch.empty_like, "Meta")


def an_unknown_operator(model: nn.Module, k: int, h: Tensor) -> Tensor:
    """It may send something to other processes, for all we know."""
    doubled: Tensor = _Double.apply(h) if k == 1 else h.sin().exp()
    return doubled


@pytest.mark.parametrize("between", [moving_average, its_own_backward, an_unknown_operator], ids=lambda f: f.__name__)
def test_a_forward_that_leaves_something_behind_is_not_tried_again(between: Any) -> None:
    torch.manual_seed(0)
    x, plain = torch.randn(256, WIDTH), Net(between)
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=0.8, time_limit_seconds=0.1)
    assert all(map(torch.equal, step(model, x), step(plain, x)))
    model.zero_grad()
    model.failures = 1
    with pytest.raises(torch.OutOfMemoryError, match="Tried to"):
        model(x)
    assert autoremat.stats(model).retries == 0


@pytest.mark.one_in(3, guard=True)
@pytest.mark.parametrize("in_module", [True, False])
@pytest.mark.parametrize("rows", [(64, 64, 64), (64, 96)], ids=str)
def test_several_forwards_in_one_autocast_region(rows: tuple[int, ...], in_module: bool) -> None:
    """They share the casts of the weights, also where a recording comes between them."""

    def train(model: nn.Module, call: Any) -> list[Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(call(torch.randn(n, WIDTH)).float() for n in rows)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def of_closure(model: nn.Module) -> Callable[[Tensor], Tensor]:
        weights = [(layer.weight, layer.bias) for layer in model.layers]  # type: ignore[union-attr]

        def forward(x: Tensor) -> Tensor:
            for weight, bias in weights:
                x = nn.functional.linear(x, weight, bias).tanh()
            return x.square().mean()

        return forward

    torch.manual_seed(0)
    model = Net(lambda model, k, h: h.sin())
    call = model if in_module else of_closure(model)
    expected = train(model, call)
    checkpointed = autoremat.checkpoint(call, budget=0.9, time_limit_seconds=0.1)
    for _ in range(3):
        assert all(map(torch.equal, train(model, checkpointed), expected))
