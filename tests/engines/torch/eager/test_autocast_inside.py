"""Kernels that call operators which autocast treats do so under autoremat as in plain training, to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import autoremat
from autoremat.engines.torch.world import apart

NUMBERS = itertools.count()


def multiplied(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A custom operator whose kernel multiplies matrices."""

    @torch.library.custom_op(name, mutates_args=())
    def op(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).float()

    op.register_fake(lambda a, b: a.new_empty(a.shape[0], b.shape[1]))
    op.register_autograd(
        lambda ctx, g: (op(g, ctx.saved_tensors[1].t().contiguous()), op(ctx.saved_tensors[0].t().contiguous(), g)),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return op


def composite(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A custom operator that is made up of others."""
    library = torch.library.Library("autocast_inside", "FRAGMENT")
    library.define(f"{name}(Tensor a, Tensor b) -> Tensor")
    library.impl(name, lambda a, b: (a @ b).float(), "CompositeImplicitAutograd")
    op = getattr(torch.ops.autocast_inside, name)
    op.library = library
    return op


def step_with(get: Callable[[], Any], w: Tensor, enabled: bool = True) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(4):
                x = torch.tanh(torch.sin(torch.exp(get()(x, w).div(8).sin())).cos()).exp().sin()
            return x.float().sum()

    return step


def compare(step: Callable[[Tensor], Tensor], w: Tensor, *, steps: int = 2) -> None:
    x = torch.randn(64, 64)
    checkpointed = autoremat.checkpoint(step, budget=0.8, time_limit_seconds=1)
    results = []
    for fn in (*[checkpointed] * steps, step):
        w.grad = None
        loss = fn(x)
        loss.backward()
        results.append((loss.detach(), w.grad))
    for loss, gradient in results:
        assert torch.equal(loss, results[-1][0])
        assert torch.equal(gradient, results[-1][1])
    stats = autoremat.stats(checkpointed)
    assert not stats.unplanned
    assert stats.reruns


@pytest.fixture(params=["apart", "here"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "here":
        monkeypatch.setattr(apart._Here, "cannot", True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("make", [multiplied, composite])
def test_custom_operator(make: Callable[[str], Any], enabled: bool) -> None:
    name = f"product{next(NUMBERS)}"
    op = make(name if make is composite else f"autocast_inside::{name}")
    w = torch.randn(64, 64, requires_grad=True)
    compare(step_with(lambda: op, w, enabled), w)


@pytest.mark.usefixtures("way")
def test_custom_operator_defined_during_the_step() -> None:
    made: list[Any] = []
    name = f"autocast_inside::late{next(NUMBERS)}"

    def late() -> Any:
        if not made:
            made.append(multiplied(name))
        return made[0]

    w = torch.randn(64, 64, requires_grad=True)
    compare(step_with(late, w), w)


@pytest.mark.usefixtures("way")
def test_custom_operator_within_inference_mode_and_without_gradients() -> None:
    op = multiplied(f"autocast_inside::product{next(NUMBERS)}")
    w = torch.randn(64, 64, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.inference_mode():
                a = op(x, w)
            with torch.no_grad():
                b = op(x, w)
            return step_with(lambda: op, w)(x) * (a.sum().item() + b.sum().item())

    compare(step, w)


def test_an_operator_inside_one_that_is_treated_as_a_whole_is_left_alone() -> None:
    w = torch.randn(64, 64, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = x
            for _ in range(3):
                h = torch.exp(torch.sin(h.float() @ w)).tanh().float()
            # In full precision: the product inside the first, in low precision: the one inside the second.
            return h.sum() + torch.pinverse(x[:8, :8]).sum() + torch.linalg.pinv(x[:8, :8]).float().sum()

    compare(step, w)
