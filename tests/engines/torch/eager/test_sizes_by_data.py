"""The data decide how large results are, while all shapes of the input are the same: masked positions, chosen rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

STEPS = 24


class Masked(nn.Module):
    """A few blocks; then a loss at the chosen rows only."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(4)
        )
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.log_softmax(self.head(x[mask]), -1).square().mean()


@pytest.mark.filterwarnings("ignore:autoremat. a step left the path")
def test_the_larger_plan_stays_and_has_room_for_what_has_outgrown_it() -> None:
    torch.manual_seed(0)
    plain = Masked()
    mine = copy.deepcopy(plain)
    dice = torch.Generator().manual_seed(3)
    batches = [(torch.randn(8, 64, 32, generator=dice), torch.rand(8, 64, generator=dice) < 0.3) for _ in range(STEPS)]
    peak = max(account(lambda b=b: plain(*b).backward(), resident(plain, *b)).peak_bytes for b in batches)  # type: ignore[misc]
    step = autoremat.checkpoint(mine, budget=int(0.75 * peak))
    left = []
    for batch in batches:
        for model, loss in ((plain, plain), (mine, step)):
            model.zero_grad()
            loss(*batch).backward()
        for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
        left.append(autoremat.stats(step).deviations)
    assert left[-1] <= 3
    assert left[-1] == left[STEPS // 2]
    assert autoremat.stats(step).planned <= 6
