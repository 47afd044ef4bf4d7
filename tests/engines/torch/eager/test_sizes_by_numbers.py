"""Results whose size the numbers decide: they are as large as the first step has shown."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import measured_peak

NODES, EDGES, WIDTH, LAYERS = 200, 4000, 8, 4


class Graph(nn.Module):
    """Convolutions over a graph, each of which takes its loops out and puts others in."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for linear in self.linears:
            loops = torch.arange(len(x)).repeat(2, 1)
            ends = torch.cat([edges[:, edges[0] != edges[1]], loops], dim=1)
            sent = linear(x).index_select(0, ends[0])
            x = torch.zeros_like(x).index_add(0, ends[1], sent).relu()
        return x.square().mean()


def test_what_a_mask_selects_counts_as_it_is() -> None:
    """Measured on another mask, it had no bytes, so that plans kept it for nothing."""
    torch.manual_seed(0)
    model, x, edges = Graph(), torch.randn(NODES, WIDTH), torch.randint(NODES, (2, EDGES))
    with pytest.raises(autoremat.InfeasibleBudget) as refused:
        autoremat.checkpoint(model, budget="1 B")(x, edges)
    autoremat.restore(model)
    call = autoremat.checkpoint(model, budget=refused.value.floor_bytes)
    peaks = []
    for _ in range(3):
        peaks.append(measured_peak(lambda: call(x, edges).backward(), model, x, edges))
        model.zero_grad()
    plan = autoremat.stats(call).plan
    assert plan is not None
    selected = {v for op in plan.program.ops if op.name == "aten.index.Tensor" for v in op.writes}
    kept = int((edges[0] != edges[1]).sum())
    assert {plan.program.values[v].nbytes for v in selected} == {2 * 8 * kept}
    assert peaks[-1] <= plan.budget_bytes


def test_the_first_step_is_not_checked_beyond_the_budget() -> None:
    """A selection was made twice at once, whatever its size, because nobody had known that beforehand."""
    torch.manual_seed(0)
    model, x, edges = Graph(), torch.randn(NODES, WIDTH), torch.randint(NODES, (2, EDGES))
    call = autoremat.checkpoint(model, budget="440 KB")
    assert measured_peak(lambda: call(x, edges).backward(), model, x, edges) <= 440_000
