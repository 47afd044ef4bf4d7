"""What is computed and leads to no loss: its graph dies with its results, in the account as in plain training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident
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
