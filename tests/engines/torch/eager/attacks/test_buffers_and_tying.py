"""Attacks on buffers, parametrizations and tied weights: all as in plain training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, data, training

__all__ = ["quick"]  # a fixture


class Counted(nn.Module):
    """Keeps a running mean in a buffer, written in place, and reads it before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean).tanh()
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.linear(x - self.mean.clone()).sin() + x


def test_buffer_written_in_place_between_two_reads() -> None:
    exact(lambda: training(nn.Sequential(*[Counted() for _ in range(4)])), steps=3)


def test_buffer_replaced_in_forward() -> None:
    class Replaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = (self.linear(x) - self.mean).tanh().sin()
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y + x

    def build() -> World:
        model = nn.Sequential(*[Replaced() for _ in range(4)])
        world = training(model)
        world.extra = lambda: [m.calls for m in model]
        return world

    exact(build, steps=3)


@pytest.mark.parametrize("how", ["hook", "parametrization"])
def test_spectral_norm(how: str) -> None:
    norm = nn.utils.spectral_norm if how == "hook" else nn.utils.parametrizations.spectral_norm
    exact(lambda: training(nn.Sequential(*[m for _ in range(4) for m in (norm(nn.Linear(16, 16)), nn.Tanh())])))


def test_two_forwards_of_spectral_norm_before_the_backward() -> None:
    def build() -> World:
        norm = nn.utils.parametrizations.spectral_norm
        model = nn.Sequential(*[m for _ in range(4) for m in (norm(nn.Linear(16, 16)), nn.Tanh())])
        real, fake = data(), data()

        def step(call: Any) -> Tensor:
            loss = call(real).mean() - call(fake).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build)


@pytest.mark.parametrize("how", ["hook", "parametrization"])
def test_weight_norm(how: str) -> None:
    norm = (lambda m: nn.utils.parametrizations.weight_norm(m)) if how == "parametrization" else old_weight_norm
    exact(lambda: training(nn.Sequential(*[m for _ in range(4) for m in (norm(nn.Linear(16, 16)), nn.Tanh())])))


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def test_cached_parametrization() -> None:
    def build() -> World:
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())])
        for m in model[::2]:
            nn.utils.parametrizations.orthogonal(m)
        x = data()

        def step(call: Any) -> Tensor:
            with nn.utils.parametrize.cached():
                loss = (call(x) + call(x.sin())).square().mean()
                loss.backward()
            return loss

        return World(model, step)

    exact(build)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, WIDTH)
            self.mid = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.mid[2].weight = self.mid[0].weight
            self.head = nn.Linear(WIDTH, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            h = self.embed(i)
            for m in self.mid:
                h = h + F.gelu(m(h))
            return self.head(h).log_softmax(-1)

    exact(lambda: training(Tied(), torch.randint(32, (ROWS,)), loss=lambda y: -y[:, 3].mean()))


@pytest.mark.one_in(3, guard=True)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm(momentum: float | None, train: bool, track: bool) -> None:
    def build() -> World:
        layers = [
            m
            for _ in range(3)
            for m in (
                nn.Linear(16, 16),
                nn.BatchNorm1d(16, momentum=momentum, track_running_stats=track),
                nn.ReLU(True),
            )
        ]
        return training(nn.Sequential(*layers).train(train))

    exact(build, steps=3)


@pytest.mark.one_in(2, guard=True)
@pytest.mark.parametrize("train", [True, False])
def test_instance_norm_with_running_statistics(train: bool) -> None:
    def build() -> World:
        layers = [
            m
            for _ in range(3)
            for m in (
                nn.Conv1d(8, 8, 3, padding=1),
                nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
                nn.GELU(),
            )
        ]
        return training(nn.Sequential(*layers).train(train), torch.randn(8, 8, 40))

    exact(build, steps=3)


def test_batch_norm_frozen_half_way() -> None:
    def build() -> World:
        model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())])
        world = training(model)
        plain = world.step
        count = iter(range(99))

        def step(call: Any) -> Tensor:
            for m in model[1::3]:
                m.train(next(count) % 4 < 2)
            return plain(call)

        world.step = step
        return world

    exact(build, steps=4)
