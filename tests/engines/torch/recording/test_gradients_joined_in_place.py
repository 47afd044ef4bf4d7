"""Gradients of a value that is read many times: the engine adds them in place, and the account says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.program import simulate
from tests.engines.torch.follow import recorded

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda y, labels: y.square().mean(),
    "cross entropy": lambda y, labels: F.cross_entropy(y, labels),
    "norm": lambda y, labels: y.norm(),
    "product of all": lambda y, labels: y.prod(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_plain_peak_with_a_value_that_is_read_at_every_step(loss: str) -> None:
    torch.manual_seed(0)
    wide, head = nn.Linear(8, 8 * 16), nn.Linear(8, 8)
    x, labels = torch.randn(16, 8), torch.arange(16) % 8
    modules = nn.ModuleList([wide, head])

    def step(x: Tensor, labels: Tensor) -> Tensor:
        gates, state = wide(x).view(16, 16, 8), x
        for i in range(16):
            state = gates[:, i] * state + gates[:, i]
        return LOSSES[loss](head(state), labels)

    peak = account(lambda: step(x, labels).backward(), resident(modules, x, labels)).peak_bytes
    modules.zero_grad()
    program, _ = recorded(step, (x, labels))
    assert simulate(program).peak_bytes == peak
