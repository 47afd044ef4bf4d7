"""Several calls before one backward share the budget: contrastive views, carried state, chunks of a sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

WIDTH, ROWS = 64, 256
Loss = Callable[[Any, list[Tensor]], Tensor]


def network(n: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *[
            m
            for _ in range(n)
            for m in (nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        ]
    )


def data(n_steps: int, n: int) -> list[list[Tensor]]:
    return [[torch.randn(ROWS, WIDTH) for _ in range(n)] for _ in range(n_steps)]


def views(net: Any, batch: list[Tensor]) -> Tensor:
    """Every view is embedded by itself; the loss compares all pairs."""
    z = [F.normalize(net(x), dim=1) for x in batch]
    return -sum(((a * b).sum(1).mean() for i, a in enumerate(z) for b in z[:i]), torch.zeros(()))


def chunks(net: Any, batch: list[Tensor]) -> Tensor:
    """What a chunk gives goes into the next one, and the backward through all of them."""
    h, loss = torch.zeros(ROWS, WIDTH), torch.zeros(())
    for x in batch:
        h = net(x + h)
        loss = loss + h.square().mean()
    return loss


def one_at_a_time(net: Any, batch: list[Tensor]) -> Tensor:
    """The backward of every call comes before the next call."""
    losses = []
    for x in batch:
        losses.append(net(x).square().mean())
        losses[-1].backward()
    return torch.stack([loss.detach() for loss in losses]).sum().requires_grad_()


def train(
    loss_of: Loss, net: nn.Module, call: Any, batches: list[list[Tensor]]
) -> tuple[list[list[Tensor]], list[int]]:
    states, peaks = [], []
    for batch in batches:
        net.zero_grad()
        losses: list[Tensor] = []

        def step(batch: list[Tensor] = batch, losses: list[Tensor] = losses) -> None:
            loss = loss_of(call, batch)
            loss.backward()
            losses.append(loss.detach())

        given = batch if loss_of is views else []  # the others are not the callable's input
        peaks.append(account(step, resident(net, *given)).peak_bytes)
        states.append([losses[0], *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    return states, peaks


@pytest.mark.one_in(2, guard=True)
@pytest.mark.parametrize(
    "share", [pytest.param(0.55, marks=pytest.mark.slow), 0.7, pytest.param(0.9, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("loss_of", [views, chunks], ids=lambda f: f.__name__)
def test_calls_that_wait_for_one_backward_share_the_budget(loss_of: Loss, share: float) -> None:
    net, batches = network(), data(4, 5)
    expected, plain_peaks = train(loss_of, net, net, batches)
    budget = int(share * max(plain_peaks))
    net = copy.deepcopy(net)
    call = autoremat.checkpoint(net, budget=budget)
    got, peaks = train(loss_of, net, call, batches)
    assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
    stats = autoremat.stats(call)
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.reruns > 0
    assert max(peaks[2:]) <= budget
    assert max(peaks) <= 1.25 * budget  # nobody knows yet how many will come


@pytest.mark.slow
@pytest.mark.guard
def test_calls_that_go_backward_at_once_have_the_budget_alone() -> None:
    net, batches = network(), data(4, 5)
    expected, plain_peaks = train(one_at_a_time, net, net, batches)
    net = copy.deepcopy(net)
    call = autoremat.checkpoint(net, budget=int(1.1 * max(plain_peaks)))
    got, _ = train(one_at_a_time, net, call, batches)
    assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
    plan = autoremat.stats(call).plan
    assert plan is not None
    assert plan.overhead == 0


def test_a_loss_that_is_still_there_does_not_count() -> None:
    net, x = network(), torch.randn(ROWS, WIDTH)
    losses, call = [], autoremat.checkpoint(lambda: net(x).square().mean(), budget=1.0)
    for _ in range(4):
        losses.append(call())
        losses[-1].backward()
    assert autoremat.stats(call).planned == 2  # without gradients, and with them


@pytest.mark.slow
@pytest.mark.guard
def test_too_many_calls_are_told_in_words() -> None:
    net, batches = network(), data(4, 24)
    budget = autoremat.plan(lambda x: net(x).square().mean(), batches[0][0], budget=1.0).plain_peak_bytes
    call = autoremat.checkpoint(net, budget=budget)
    with pytest.warns(RuntimeWarning, match="24 calls wait for one backward"):
        train(views, net, call, batches)
