"""What is computed and leads to no loss: its graph dies with its results, in the account as in plain training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, measured_peak, resident
from autoremat.program import simulate
from tests.engines.torch.follow import recorded


@dataclass
class Outputs:
    """As libraries return them: hidden states of every layer beside what is used."""

    hidden: list[Tensor]


class Tower(nn.Module):
    """Layers of which the last ones are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: Tensor) -> Outputs:
        """Go through all layers."""
        hidden = [x]
        for layer in self.layers:
            hidden.append(torch.tanh(layer(hidden[-1]) * 2).exp())
        return Outputs(hidden)


def test_the_plain_peak_of_a_tower_whose_last_layers_are_not_used() -> None:
    torch.manual_seed(0)
    tower, head, x = Tower(), nn.Linear(64, 512), torch.randn(128, 64)
    modules = nn.ModuleList([tower, head])

    def step(x: Tensor) -> Tensor:
        return head(tower(x).hidden[3]).log_softmax(-1).square().mean()

    peak = account(lambda: step(x).backward(), resident(modules, x)).peak_bytes
    modules.zero_grad(set_to_none=True)
    program, _ = recorded(step, (x,))
    assert abs(simulate(program).peak_bytes - peak) <= 64


def test_a_result_that_stays_keeps_its_graph() -> None:
    torch.manual_seed(0)
    tower, x, kept = Tower(), torch.randn(128, 64), list[Outputs]()

    def step(x: Tensor) -> Tensor:
        kept[:] = [tower(x)]
        return kept[0].hidden[3].square().mean()

    peaks = []
    call = autoremat.checkpoint(step, budget=1.0)
    for run in (step, call, call):
        tower.zero_grad(set_to_none=True)
        kept.clear()
        peaks.append(account(lambda run=run: run(x).backward(), resident(tower, x)).peak_bytes)
    plan = autoremat.stats(call).plan
    assert plan is not None
    assert abs(plan.plain_peak_bytes - peaks[0]) <= 64
    assert peaks[2] <= plan.peak_bytes + 64


@pytest.mark.parametrize(
    "look", [torch.abs, lambda x: x.square().mean(), torch.isfinite], ids=["abs", "metric", "isfinite"]
)
def test_a_look_at_activations_that_is_thrown_away_costs_nothing(look: Callable[[Tensor], Tensor]) -> None:
    """Its graph is gone at once, so that what it has saved is free to go."""
    torch.manual_seed(0)
    modules = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.GELU())))
    x = torch.randn(512, 64)

    def step(x: Tensor, looks: bool) -> Tensor:
        for module in modules:
            x = module(x)
            if looks:
                look(x)
        return x.square().mean()

    plain, plan = (autoremat.plan(lambda x, looks=looks: step(x, looks), x, budget=1.0) for looks in (False, True))
    modules.zero_grad()
    assert plan.plain_peak_bytes == measured_peak(lambda: step(x, looks=True).backward(), modules, x)
    assert plan.floor_bytes == plain.floor_bytes
    budget = int(1.15 * plan.floor_bytes)
    call = autoremat.checkpoint(lambda x: step(x, looks=True), budget=budget)
    for _ in range(3):
        modules.zero_grad()
        assert measured_peak(lambda: call(x).backward(), modules, x) <= budget
