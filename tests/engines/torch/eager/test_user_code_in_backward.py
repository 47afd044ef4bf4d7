"""Code of the user's in the backward: of custom Functions, and hooks on tensors. What it takes is in the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.planner import solving as portfolio
from tests.engines.torch.compare import quick  # noqa: F401 - a fixture for every test

ROWS, WIDTH = 512, 32


class Again(torch.autograd.Function):
    """Computes a block again within its backward, and goes backward through that."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.block(x)
        torch.autograd.backward(out, gradient)
        return None, x.grad


class Blocks(nn.Module):
    """Every other block is computed again by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One number."""
        for i, block in enumerate(self.blocks):
            x = Again.apply(block, x) if i % 2 else block(x)  # type: ignore[no-untyped-call]
        return x.square().mean()


class Implicit(nn.Module):
    """A fixed point, and a hook that solves for its gradient by passes through a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())])
        self.inner, self.seen = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        """One number."""
        x = self.before(x)
        z = torch.tanh(self.inner(x))
        z0 = z.detach().requires_grad_()
        f0 = torch.tanh(self.inner(z0)) * x.detach().sigmoid()

        def hook(gradient: Tensor) -> Tensor:
            self.seen += 1
            found = gradient
            for _ in range(3):
                found = torch.autograd.grad(f0, z0, found, retain_graph=True)[0] + gradient
            return found

        z.register_hook(hook)
        return self.before(z).square().mean()


class WithStatistics(torch.autograd.Function):
    """Gives a second result, as large as the first, and a mask; where nobody reads them, autograd makes zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mask = x.tanh(), x > 0
        ctx.save_for_backward(y)
        ctx.mark_non_differentiable(mask)
        return y, y.exp(), mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Unread(nn.Module):
    """Layers whose Functions give more than is read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """One number."""
        for layer in self.layers:
            x = WithStatistics.apply(layer(x))[0]  # type: ignore[no-untyped-call]
        return x.square().mean()


def peaks(net: nn.Module, call: Callable[[Tensor], Tensor], steps: int = 3) -> list[int]:
    """Measured peaks of steps; gradients are left of the last one."""
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        net.zero_grad()
        x = torch.randn(ROWS, WIDTH, requires_grad=True)
        found.append(account(lambda x=x: call(x).backward(), resident(net, x)).peak_bytes)  # type: ignore[misc]
    return found


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", [Blocks, Implicit, Unread])
def test_what_code_in_the_backward_takes_is_in_the_plan(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = kind()
    net = copy.deepcopy(plain)
    budget = int(0.75 * max(peaks(plain, plain)))
    step = autoremat.checkpoint(lambda x: net(x), budget=budget)
    measured = peaks(net, step)[1:]
    stats = autoremat.stats(step)
    assert stats.plan is not None
    assert stats.deviations == stats.unplanned == 0
    assert stats.planned == 2
    assert max(measured) <= budget
    assert max(measured) == pytest.approx(stats.plan.peak_bytes, rel=0.01)
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.slow
@pytest.mark.guard
def test_a_graph_that_a_hook_goes_through_is_kept() -> None:
    torch.manual_seed(0)
    net = Implicit()
    plain = autoremat.plan(net, torch.randn(ROWS, WIDTH), budget=1.0).plain_peak_bytes
    step = autoremat.checkpoint(lambda x: net(x), budget=int(0.7 * plain))
    peaks(net, step, 2)
    reruns = autoremat.stats(step).reruns
    peaks(net, step, 1)
    assert autoremat.stats(step).reruns - reruns <= 30
    assert net.seen == 3


def test_what_is_left_of_a_graph_after_its_backward_waits_for_nothing() -> None:
    torch.manual_seed(0)
    net, losses = Implicit(), list[Tensor]()
    plain = autoremat.plan(net, torch.randn(ROWS, WIDTH), budget=1.0).plain_peak_bytes
    step = autoremat.checkpoint(lambda x: net(x), budget=int(0.7 * plain))
    for _ in range(3):
        losses.append(step(torch.randn(ROWS, WIDTH, requires_grad=True)))
        losses[-1].backward()
    assert autoremat.stats(step).reruns <= 150


def test_hooks_and_functions_are_called_as_often_as_in_plain_training() -> None:
    calls = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            calls.append("function")
            return 2 * gradient

    def hook(gradient: Tensor) -> Tensor:
        calls.append("hook")
        if len(calls) > 4:
            raise ValueError("enough")
        return gradient

    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        h = (x @ weight).sin()
        h.register_hook(hook).remove()
        h.register_hook(hook)
        return Twice.apply(h).cos().sum()  # type: ignore[no-any-return, no-untyped-call]

    step = autoremat.checkpoint(forward, budget=1.0)
    x = torch.randn(ROWS, WIDTH)
    for _ in range(2):
        step(x).backward()
    assert calls == ["function", "hook"] * 2
    with pytest.raises(ValueError, match="enough"):
        step(x).backward()
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_error_in_a_hook_of_the_first_step_leaves_nothing_behind() -> None:
    def hook(gradient: Tensor) -> Tensor:
        raise ValueError("not here")

    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        h = (x @ weight).sin()
        h.register_hook(hook)
        return h.cos().sum()

    step = autoremat.checkpoint(forward, budget=1.0)
    with pytest.raises(ValueError, match="not here"):
        step(torch.randn(ROWS, WIDTH)).backward()
    assert not torch.overrides._get_current_function_mode_stack()


class KeepsItsResult(torch.autograd.Function):
    """Saves what it was given, what it returns, and something between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh().exp()
        ctx.save_for_backward(x, y, y.sin())
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        x, y, between = ctx.saved_tensors
        return gradient * y * between + x


@pytest.mark.slow
@pytest.mark.guard
def test_what_a_custom_function_saves_of_its_own_is_in_the_plan() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(net: nn.ModuleList, x: Tensor) -> Tensor:
        for linear in net:
            x = KeepsItsResult.apply(linear(x)).tanh()  # type: ignore[no-untyped-call]
        return x.square().mean()

    net = copy.deepcopy(plain)
    plain_peak = max(peaks(plain, lambda x: forward(plain, x)))
    budget = int(0.75 * plain_peak)
    step = autoremat.checkpoint(lambda x: forward(net, x), budget=budget)
    measured = peaks(net, step)[1:]
    plan = autoremat.stats(step).plan
    assert plan is not None
    assert plan.plain_peak_bytes == pytest.approx(plain_peak, rel=0.01)
    assert max(measured) == pytest.approx(plan.peak_bytes, rel=0.01)
    assert max(measured) <= budget
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("kind", [Blocks, Implicit, Unread])
def test_the_second_plan_is_found_without_looking_for_all_others(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = kind()
    step = autoremat.checkpoint(net, budget=int(0.75 * max(peaks(net, net))), time_limit_seconds=0.5)
    peaks(net, step, steps=1)
    monkeypatch.setattr(portfolio, "_pool_of", None)
    peaks(net, step, steps=2)
    assert autoremat.stats(step).planned == 2
