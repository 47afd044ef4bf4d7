"""Attacks with custom functions and with NumPy inside the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.engines.torch.compare import quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, Saves, check_body

__all__ = ["quick"]  # a fixture


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2).sin_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * 2 * (1 - y * y).clamp(min=0).sqrt()


class ReturnsView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(2, -1, WIDTH), x[:, ::2]

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        out = a.reshape(ROWS, WIDTH).clone()
        out[:, ::2] += b
        return out


class ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class SavesNothingButSelf(torch.autograd.Function):
    """The old way: setup_context, materialize_grads, needs_input_grad, non-differentiable outputs."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x * w, (x > 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0) if ctx.needs_input_grad[1] else None


def test_custom_function_that_saves_and_reads_twice() -> None:
    check_body(lambda i, h: Saves.apply(h, 0.5 + i) * h.cos())


def test_custom_function_that_works_in_place() -> None:
    check_body(lambda i, h: Dirty.apply(h * 0.5) * h.cos())


def test_custom_function_that_returns_views() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        a, b = ReturnsView.apply(h.sin())
        return a.reshape(ROWS, WIDTH).cos() + torch.cat([b, b], 1).tanh()

    check_body(body)


def test_custom_function_with_setup_context() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y, mask = SavesNothingButSelf.apply(h.sin(), h.mean(0))
        return torch.where(mask, y, h).cos()

    check_body(body)


def test_custom_function_through_numpy() -> None:
    check_body(lambda i, h: ThroughNumpy.apply(h.sin() * 2).cos())


def test_numpy_reads_in_the_middle() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        scale = h.detach().numpy().mean(0)
        return (h * torch.from_numpy(scale)).sin() * h.cos() + torch.tensor(scale.tolist())

    check_body(body)


def test_numpy_writes_into_an_activation() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y.detach().numpy()[:, ::2] *= 0.5
        np.random.default_rng(0).shuffle(y.detach().numpy())
        return y.sin() * h.cos()

    check_body(body)


def test_numpy_fills_memory_that_torch_made() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = torch.zeros(ROWS, WIDTH)
        y.numpy()[:] = np.sin(h.detach().numpy())
        return (y * h).sin() * h.cos()

    check_body(body)
