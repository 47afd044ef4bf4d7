"""Models and steps for the tests of the compiled engine, and what two trainings have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig
from autoremat.engines.torch.world.memory_account import account, resident


class WithLoss(nn.Module):
    """A model that returns its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())


class InPlace(nn.Module):
    """Overwrites its own results, and a buffer that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.register_buffer("count", torch.zeros(64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(x)
            h.relu_()
            h = h + x
            h[:, :8] *= 2.0
            self.count += h.detach().mean(0)
            x = x + 0.1 * (h * self.count.clone()).tanh()
        return F.mse_loss(x, y)


class Autocast(nn.Module):
    """Computes in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(x)
        return F.cross_entropy(logits.float().flatten(0, -2), y.flatten())


class Broken(nn.Module):
    """Two graphs to the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = layers(), layers()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return F.mse_loss(self.second(x), y)


class Regression(nn.Module):
    """One graph to the compiler."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = layers(drop)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.layers(x), y)


def layers(drop: float = 0.0, n: int = 4) -> nn.Sequential:
    def layer() -> nn.Sequential:
        return nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Dropout(drop), nn.Linear(96, 32))

    return nn.Sequential(*[layer() for _ in range(n)])


def gpt(blocks: int = 2, dropout: float = 0.1) -> GPT:
    return GPT(GPTConfig(blocks=blocks, width=32, heads=2, context=32, dropout=dropout))


def resnet() -> ResNet:
    return ResNet(ResNetConfig(widths=(8, 16), blocks_per_stage=1, dropout=0.2))


def tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (4, 32)), torch.randint(0, 256, (4, 32))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))


def rows(n: int = 128, width: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, width), torch.randn(n, width)


@dataclass(frozen=True)
class Case:
    """A model with its data."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    has_scratch: bool = False
    """Whether kernels take memory beside their results."""

    def __str__(self) -> str:
        return self.name


GPT_DROPOUT = Case("GPT with dropout", lambda: WithLoss(gpt()), tokens)
MLP = Case("MLP with dropout", lambda: Regression(0.3), rows)
RESNET = Case("ResNet with batch norm", lambda: WithLoss(resnet()), images, has_scratch=True)
IN_PLACE = Case("in place", InPlace, lambda: rows(128, 64))
AUTOCAST = Case("autocast", lambda: Autocast(gpt()), tokens)


def clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def train(model: nn.Module, call: Callable[..., Tensor], data: Sequence[Tensor], steps: int = 2) -> list[Tensor]:
    """All that training leaves behind: losses, gradients, buffers, the state of the generator."""
    left = []
    for k in range(steps):
        clear(model)
        torch.manual_seed(k)
        loss = call(*data)
        loss.backward()
        left += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        left += [*(b.clone() for b in model.buffers()), torch.get_rng_state()]
    assert all(t.isfinite().all() for t in left), "what is not a number is equal to nothing"
    return left


def peak(model: nn.Module, call: Callable[..., Tensor], data: Sequence[Tensor]) -> int:
    """What a step takes at its peak, by the allocator's account."""
    clear(model)
    return account(lambda: call(*data).backward(), resident(model, *data)).peak_bytes


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two trainings have left the same, bit for bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def built(case: Case, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model with its data, the same ones for one seed."""
    torch.manual_seed(seed)
    return case.build(), case.data()


def plain(case: Case, backend: Any = "aot_eager", **options: Any) -> list[Tensor]:
    """What training the compiled model leaves, without autoremat."""
    model, data = built(case)
    model = copy.deepcopy(model)
    return train(model, torch.compile(model, backend=backend, **options), data)
