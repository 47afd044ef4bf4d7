"""Networks whose steps take several paths, trained beside their plain selves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

WIDTH = 64


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def both(model: nn.Module, budget: Any, batches: list[Any], loss_of: Callable[[nn.Module, Any], Tensor]) -> list[int]:
    """Train plainly and under the budget on the same batches; the peaks measured, step by step, from the second on."""
    plain, peaks = copy.deepcopy(model), list[int]()
    step = autoremat.checkpoint(lambda batch: loss_of(model, batch), budget=budget, time_limit_seconds=1.0)
    for batch in batches:
        for m in (plain, model):
            m.zero_grad()
        state = torch.get_rng_state()
        expected = loss_of(plain, batch)
        expected.backward()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        planned = autoremat.stats(step).planned
        losses: list[Tensor] = []
        leaves = [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]

        def run(batch: Any = batch, losses: list[Tensor] = losses) -> None:
            losses.append(_backward(step(batch)))

        seen = account(run, resident(model, *leaves))
        if autoremat.stats(step).planned == planned:  # else operators have been measured in between
            peaks.append(seen.peak_bytes)
        assert torch.equal(losses[0], expected.detach())
        assert torch.equal(torch.get_rng_state(), after)
        assert all(map(torch.equal, gradients(model), gradients(plain)))
        assert len(gradients(model)) == len(gradients(plain))
    both.stats = autoremat.stats(step)  # type: ignore[attr-defined]
    return peaks


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def blocks(n: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(n)
    )


class Rounds(nn.Module):
    """As many layers as the data ask for, with random numbers, running statistics and calls in place in them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 2 * WIDTH), nn.BatchNorm1d(2 * WIDTH), nn.ReLU(inplace=True), nn.Dropout(0.1)
            )
            for _ in range(10)
        )
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for layer in self.layers[: int(n)]:
            x = x + self.down(layer(x)).tanh()
        return x.square().mean()


def budget_of(model: nn.Module, share: float, *args: Tensor) -> int:
    """This share of plain training's peak with these inputs."""
    return int(share * autoremat.plan(copy.deepcopy(model), *args, budget=1.0, timing="measure").plain_peak_bytes)
