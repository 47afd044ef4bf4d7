"""The backward of a first step: it goes by the plan, though the forward has not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import measured_peak


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("above", [1.1, 1.3, 1.5])
def test_what_the_user_holds_is_not_made_again(n: int, above: float) -> None:
    """Autograd has not saved the hidden states, so nobody but the user holds them; the plan begins reruns with them."""
    torch.manual_seed(0)
    layers, x = nn.ModuleList(nn.Linear(64, 64) for _ in range(n)), torch.randn(512, 64)

    def step(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden = []
        for layer in layers:
            hidden.append(nn.functional.dropout(layer(x), 0.1))
            x = torch.relu(hidden[-1] + 1)
        return x.square().mean(), hidden

    def run(call: object) -> list[Tensor | None]:
        torch.manual_seed(1)
        layers.zero_grad()
        loss, hidden = call(x)  # type: ignore[operator]
        loss.backward()
        assert len(hidden) == n
        return [p.grad for p in layers.parameters()]

    budget = int(above * autoremat.plan(step, x, budget=1.0).floor_bytes)
    plain, call, found = run(step), autoremat.checkpoint(step, budget=budget), []
    for _ in range(2):
        layers.zero_grad()
        assert measured_peak(lambda: found.append(run(call)), layers, x) <= budget
    for gradients in found:
        assert all(map(torch.equal, plain, gradients))
    assert autoremat.stats(call).planned == 1


@pytest.mark.parametrize("above", [1.1, 1.3])
def test_a_pass_within_the_forward_is_over_when_the_backward_begins(above: float) -> None:
    """A gradient penalty: the plan's acts begin with that pass, whose values the plan drops before the backward."""
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(64, 64), nn.Softplus())], nn.Linear(64, 1))
    x = torch.randn(512, 64)

    def step(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return slope.square().mean()

    def run(call: object) -> list[Tensor | None]:
        net.zero_grad()
        call(x).backward()  # type: ignore[operator]
        return [p.grad for p in net.parameters()]

    budget = int(above * autoremat.plan(step, x, budget=1.0).floor_bytes)
    plain, call, found = run(step), autoremat.checkpoint(step, budget=budget), []
    net.zero_grad()
    peak = measured_peak(lambda: found.append(run(call)), net, x)
    for a, b in zip(plain, found[0], strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and a.equal(b))
    assert peak <= budget
    assert autoremat.stats(call).deviations == 0
