"""Operators of torch whose fake kernels refuse what their real ones take."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from tests.engines.torch.eager.paths import gradients


class Experts(nn.Module):
    """A mixture of four experts, by grouped products; on CPU they take float32, on fake tensors bfloat16 only."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, width, 3 * width) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 3 * width, width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([64, 128, 192, 256], dtype=torch.int32)
        for _ in range(4):
            x = x + torch._grouped_mm(F.silu(torch._grouped_mm(x, self.up, offs=ends)), self.down, offs=ends)
        return x.square().mean()


def test_grouped_products_run_again(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(256, 64), Experts()
    plain = copy.deepcopy(model)
    plan = autoremat.plan(model, x, budget=1.0)
    assert plan.floor_bytes <= 0.6 * plan.plain_peak_bytes
    step = autoremat.checkpoint(model, budget=plan.floor_bytes)
    for _ in range(3):
        for m in (plain, step):
            m.zero_grad()
            m(x).backward()
        assert all(map(torch.equal, gradients(step), gradients(plain)))
    assert autoremat.stats(step).reruns > 0
    assert caplog.messages == []
