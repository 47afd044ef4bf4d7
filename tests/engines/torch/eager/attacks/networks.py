"""Networks and steps to attack, and what asserts that training them is as in plain training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, seeded

ROWS, WIDTH = 256, 16


class Net(nn.Module):
    """A stack of layers with ``body(layer number, h)`` after each linear map."""

    def __init__(self, body: Callable[[int, Tensor], Tensor], depth: int = 5, **modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.body = body
        self.more = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.body(i, torch.tanh(layer(x)))
        return x


def data() -> Tensor:
    return torch.randn(ROWS, WIDTH)


def training(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] = lambda y: (y * y).mean()) -> World:
    """Steps that change the input and the parameters."""
    inputs = inputs or (data(),)

    def step(call: Any) -> Tensor:
        model.zero_grad()
        out = loss(call(*inputs))
        out.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None and p.grad.layout is torch.strided:
                    p -= 0.01 * p.grad
        return out

    return World(model, step)


def check_body(body: Callable[[int, Tensor], Tensor], **options: Any) -> None:
    exact(lambda: training(Net(body)), **options)


def curly(i: int, h: Tensor) -> Tensor:
    return h.exp().sin() * h.cos()


def net(depth: int = 5) -> Net:
    return Net(curly, depth)


def check_step(step: Callable[[Any, Tensor], Any], model: Callable[[], nn.Module] = net, **options: Any) -> None:
    """The same model, another step: ``step(call, x)``; gradients accumulate only within a step."""

    def build() -> World:
        target, x = model(), data()

        def whole(call: Any) -> Any:
            target.zero_grad()
            return step(call, x)

        return World(target, whole)

    exact(build, **options)


def call_parameters(call: Any) -> Any:
    return call.parameters()


class Saves(torch.autograd.Function):
    """Saves input, intermediate and output; reads them twice; keeps things on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        inner = (x * scale).exp()
        out = inner.sin()
        ctx.save_for_backward(x, inner, out)
        ctx.scale, ctx.extra = scale, inner.cos()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, inner, _ = ctx.saved_tensors
        _, again, out = ctx.saved_tensors
        assert torch.equal(inner, again)
        return grad * ctx.extra * inner * ctx.scale + 0 * out + 0 * x, None


def nothing_active() -> bool:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    module_hooks = nn.modules.module
    return not (stack or hooks or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


def tight(build: Callable[[], World]) -> tuple[World, Any]:
    """A world with its target checkpointed at its floor."""
    budget = 1
    while True:
        world = seeded(build)
        call = autoremat.checkpoint(world.target, budget=budget, time_limit_seconds=0.1)
        try:
            world.step(call)
        except autoremat.InfeasibleBudget as error:
            budget = error.floor_bytes
        else:
            return world, call


def tensors_alive() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


class Layers(nn.Module):
    """Layers with ``body(layer number, h)``, a method, after each linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.body(i, torch.tanh(layer(x)))
        return x
