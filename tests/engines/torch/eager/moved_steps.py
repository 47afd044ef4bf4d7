"""A small network whose values move to a tier and back, its plan, and tiers in place of the user's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.tier import Disk
from autoremat.program import Link, Plan, Program, Schedule, simulate, verify
from tests.engines.torch.eager.stores import Late, TierOfStores
from tests.engines.torch.follow import recorded
from tests.planner.random_offloads import with_random_offloads

ROWS, WIDTH = 256, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.up(self.norm(x)))
        return x + nn.functional.dropout(self.down(h), 0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


def inputs() -> Tensor:
    return torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)


def loss_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


def numbers(model: nn.Module, call: Callable[[Tensor], Tensor], backward: Callable[[Tensor], None]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = call(inputs())
    backward(loss)
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None), torch.get_rng_state()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return numbers(model, call, Tensor.backward)


@cache
def plain() -> list[Tensor]:
    model = network()
    return step(model, loss_of(model))


@cache
def program() -> Program:
    return replace(recorded(loss_of(network()), (inputs(),))[0], link=Link(1e9, 1e9, name="disk:a test"))


@cache
def plan(seed: int = 0) -> Plan:
    """Most of what may move moves; nothing is recomputed."""
    schedule = with_random_offloads(program(), Schedule.plain(program()), random.Random(seed))
    assert verify(program(), schedule) == ()
    timeline = simulate(program(), schedule)
    peak, plain_peak = timeline.peak_bytes, simulate(program()).peak_bytes
    overhead = timeline.overhead_seconds / program().seconds
    assert len(schedule.offloads) > 5
    return Plan(program(), schedule, peak, peak, plain_peak, peak, overhead, 0.0, "moved")


@pytest.fixture
def with_stores(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Late]], TierOfStores]:
    """Put a tier of test stores in place of the user's."""

    def put(make: Callable[[], Late]) -> TierOfStores:
        tier = TierOfStores(make)
        monkeypatch.setattr("autoremat.engines.torch.eager.options.TierOf", lambda name, budget: tier)
        return tier

    return put


Put = Callable[[Callable[[], Late]], TierOfStores]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a test is as fast as these ops take a fast device to be."""
    link = Link(1e12, 1e12)
    monkeypatch.setattr(
        Disk, "link", lambda disk: replace(link, name=f"disk:{disk.folder}", tier_bytes=disk.most_bytes)
    )


def peak_of(model: nn.Module, call: Callable[[Tensor], Tensor]) -> int:
    model.zero_grad()
    x = inputs()
    return account(lambda: call(x).backward(), resident(model, x)).peak_bytes
