"""Gradients of a value that is read many times: the engine adds them in place, and the account says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat.engines.torch.recording.packs import Packs
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


class Squares(torch.autograd.Function):
    """Saves what it is given; recorded by one op that stands for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


def test_nothing_that_was_asked_for_is_open_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call has saved lives by torch's graph alone, whoever made the call last."""
    still_open: list[bool] = []
    finish = Packs.finish
    monkeypatch.setattr(Packs, "finish", lambda packs: (still_open.append(packs.are_open()), finish(packs)))
    torch.manual_seed(0)
    head, x, labels = nn.Linear(8, 8), torch.randn(16, 8), torch.arange(16) % 8
    for loss in (*LOSSES.values(), lambda y, labels: Squares.apply(y)):
        recorded(lambda x, loss=loss: loss(head(x).sin(), labels), (x,))
    assert still_open == [False] * (len(LOSSES) + 1)
