"""Functions of torch that are made of others are heard as one where there is nothing to do inside; else looked into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.listener import Listener
from autoremat.engines.torch.eager.stats import Stats

STEADY = 8
"""After so many steps nobody prepares for leaving the path any more."""


class Block(nn.Module):
    """Attention whose flags and memory may change between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)
        self.need_weights, self.dropout = False, 0.1
        self.memory = torch.randn(4, 8, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.attention.dropout = self.dropout
        for _ in range(3):
            x = self.out(torch.tanh(x))
            x = x + self.attention(x, self.memory, self.memory, need_weights=self.need_weights)[0]
        return x.square().mean()


@pytest.fixture
def looked_into(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that are looked into."""
    found: list[str] = []
    look_into = Listener.look_into

    def noted(self: Listener, func: Any, args: Any, kwargs: Any) -> Any:
        found.append(func.__name__)
        return look_into(self, func, args, kwargs)

    monkeypatch.setattr(Listener, "look_into", noted)
    return found


def train(change: Callable[[Block], None], looked_into: list[str], budget: Any = "100%") -> Stats:
    """Some steps, then a change, then more; every one compared to plain training."""
    torch.manual_seed(0)
    plain = Block()
    mine = copy.deepcopy(plain)
    autoremat.checkpoint(mine, budget=budget)
    for step in range(STEADY + 3):
        if step == STEADY:
            looked_into.clear()
            change(plain)
            change(mine)
        x, losses = torch.randn(4, 8, 16), []
        for model in (plain, mine):
            model.zero_grad()
            torch.manual_seed(step)
            loss = model(x)
            loss.backward()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), mine.parameters(), strict=True))
    return autoremat.stats(mine)


@pytest.mark.slow
@pytest.mark.guard
def test_where_everything_is_kept_nothing_is_looked_into(looked_into: list[str]) -> None:
    stats = train(lambda model: None, looked_into)
    assert stats.deviations == 0
    assert looked_into == []


def test_where_something_is_made_again_it_is(looked_into: list[str]) -> None:
    train(lambda model: None, looked_into, budget="75%")
    assert looked_into


def want_weights(model: Block) -> None:
    model.need_weights = True


def drop_more(model: Block) -> None:
    model.dropout = 0.3


def remember_more(model: Block) -> None:
    model.memory = torch.ones(64, 8, 16)


@pytest.mark.filterwarnings("ignore:autoremat")
@pytest.mark.parametrize(("change", "deviates"), [(want_weights, True), (drop_more, False), (remember_more, True)])
def test_another_argument_is_noticed(change: Any, deviates: bool, looked_into: list[str]) -> None:
    stats = train(change, looked_into)
    assert looked_into, "the function is looked into once it is given something else"
    assert bool(stats.deviations) == deviates


def test_another_state_is_noticed(looked_into: list[str]) -> None:
    model = autoremat.checkpoint(Block(), budget="100%")
    x = torch.randn(4, 8, 16)
    for step in range(STEADY + 1):
        if step == STEADY:
            looked_into.clear()
        model(x).backward()
        model.zero_grad()
    assert not looked_into
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert looked_into


def test_nobodys_comparison_is_run() -> None:
    class Mean(str):
        compared = 0
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            Mean.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    linear, reduction = nn.Linear(8, 8), Mean("mean")
    plainly = Mean.compared

    def loss(x: Tensor) -> Tensor:
        return torch.nn.functional.smooth_l1_loss(linear(x), x, reduction=reduction)

    loss(torch.randn(4, 8)).backward()
    per_step, Mean.compared = Mean.compared - plainly, 0
    step = autoremat.checkpoint(loss, budget="100%")
    for _ in range(STEADY):
        step(torch.randn(4, 8)).backward()
    assert Mean.compared == STEADY * per_step


def test_calls_that_draw_wait_for_each_other_though_the_plan_keeps_what_they_make(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may be noting what it draws: a number taken from it in between, it could not draw again."""
    entered = 0

    class Lock:
        def __enter__(self) -> None:
            nonlocal entered
            entered += 1

        def __exit__(self, *error: object) -> None:
            pass

    attention, linear = nn.MultiheadAttention(16, 2, 0.1), nn.Linear(16, 16)

    def loss(x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(linear(x), 0.1)
        return torch.rand_like(y).mul(attention(y, y, y, need_weights=False)[0]).sum()

    step = autoremat.checkpoint(loss, budget="100%")
    for _ in range(STEADY):
        step(torch.randn(8, 4, 16)).backward()
        attention.zero_grad()
        linear.zero_grad()
    monkeypatch.setattr("autoremat.engines.torch.eager.follow.DRAWING", Lock())
    step(torch.randn(8, 4, 16)).backward()
    assert entered == 3
