"""A network with scripted parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Act(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lin = nn.Parameter(torch.ones(32)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x)
        return x + torch.tanh(y * self.a) * torch.sigmoid(y)


def scripted() -> nn.Sequential:
    torch.manual_seed(0)
    plain = [m for _ in range(4) for m in (nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Tanh())]
    return nn.Sequential(*[torch.jit.script(Act()) for _ in range(3)], *plain, nn.Linear(32, 8))
