"""Gradients that stay in a training whose batches grow: what fits by itself is not refused."""

from __future__ import annotations

import copy

import torch
from torch import nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

WIDTH = 24


def test_a_plan_ahead_of_its_time_does_not_refuse_what_fits() -> None:
    """After two sizes there is a plan for larger ones; with gradients it may not fit where the batch itself does."""
    torch.manual_seed(0)
    mine = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))] * 3)
    plain, largest = copy.deepcopy(mine), torch.randn(100, WIDTH)
    asked = autoremat.plan(lambda x: mine(x).square().mean(), largest, budget=1.0, timing="measure", accumulate=True)
    step = autoremat.checkpoint(lambda x: mine(x).square().mean(), budget=asked.floor_bytes)
    for rows in (60, 90):
        step(torch.randn(rows, WIDTH)).backward()
        mine.zero_grad()
    assert autoremat.stats(step).planned == 3  # one of them ahead
    for _ in range(3):
        plain(largest).square().mean().backward()
        seen = account(lambda: step(largest).backward(), resident(mine, largest))
        assert seen.peak_bytes <= asked.floor_bytes
        for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
