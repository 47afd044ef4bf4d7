"""Parts of a model checkpointed with ``torch.utils.checkpoint`` by the user: what they are given is planned as well."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autoremat
from autoremat.engines.torch.world.memory_account import measured_peak
from tests.engines.torch.compare import quick  # noqa: F401 - a fixture for every test

ROWS, WIDTH = 512, 32


class Network(nn.Module):
    """Blocks, some of which torch reruns; without random states, which torch would hold for each."""

    def __init__(self, by_hand: set[int]) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One number."""
        for i, block in enumerate(self.blocks):
            by_hand = i in self.by_hand
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if by_hand else block(x)
        return x.square().mean()


def peaks(net: nn.Module, step: nn.Module, steps: int) -> list[int]:
    """Measured peaks of steps; gradients are left of the last one."""
    torch.manual_seed(1)
    found = []
    for _ in range(steps):
        net.zero_grad()
        x = torch.randn(ROWS, WIDTH)
        found.append(measured_peak(lambda x=x: step(x).backward(), net, x))  # type: ignore[misc]
    return found


@pytest.mark.parametrize("by_hand", [{1, 4}, set(range(6))], ids=["some", "all"])
def test_what_a_part_is_given_is_planned(by_hand: set[int]) -> None:
    torch.manual_seed(0)
    plain = Network(by_hand)
    net = copy.deepcopy(plain)
    inputs = ROWS * WIDTH * 4
    top = max(peaks(plain, plain, 3))
    floor = autoremat.plan(net, torch.randn(ROWS, WIDTH), budget=top).floor_bytes
    bare = copy.deepcopy(plain)
    bare.by_hand = set()
    lowest = autoremat.plan(bare, torch.randn(ROWS, WIDTH), budget="90%").floor_bytes
    assert floor <= lowest + 4 * inputs  # what a part makes is there at once; that others wait is no matter
    for budget in (floor, (floor + top) // 2):
        step = autoremat.checkpoint(net, budget=budget)
        measured = peaks(net, step, 3)
        stats = autoremat.stats(step)
        assert stats.deviations == stats.unplanned == 0
        assert stats.plan is not None
        assert max(measured) <= budget
        assert measured[-1] == pytest.approx(stats.plan.peak_bytes, rel=0.002)
        autoremat.restore(net)
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.equal(q.grad)
