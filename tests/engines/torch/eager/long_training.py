"""Two equal models, one of them checkpointed, trained for long with a census now and then."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.backward import Backward
from autoremat.engines.torch.eager.handle import Handle

STEPS, EVERY = 2000, 250
OTHER_PATHS = (50, 100, 150)


class Model(nn.Module):
    """Dropout, batch norm, and three times another path."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(4))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = F.dropout(torch.tanh(norm(layer(x))), 0.1)
            x = x + (h.sin() * h.exp() if self.steps not in OTHER_PATHS else h.cos().mul_(2))
        return x


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def is_tape(o: object) -> bool:
    return type(o) in (Backward, Handle)


def census() -> dict[str, int]:
    """What is alive: tensors, tapes, handles, Python objects; and the memory of the process."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "tensors": sum(issubclass(type(o), Tensor) for o in objects),
        "tapes": sum(map(is_tape, objects)),
        "objects": len(objects),
        "resident": resident_bytes(),
    }


def batch(k: int) -> Tensor:
    """Every tenth is shorter."""
    return torch.randn(96 if k % 10 else 64, 16, generator=torch.Generator().manual_seed(k))


def train(model: nn.Module, every: int = 0) -> tuple[list[Tensor], list[dict[str, int]]]:
    """Losses, generator, parameters and buffers at the end; a census after so many steps each, if asked for."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    losses, counts = [], []
    for k in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(k)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del loss
        if every and k % every == every - 1:
            counts.append(census())
    return [torch.tensor(losses), torch.get_rng_state(), *model.state_dict().values()], counts


def pair() -> tuple[Model, Model]:
    """Two equal models, the second one checkpointed."""
    torch.manual_seed(0)
    plain, mine = Model(), Model()
    mine.load_state_dict(plain.state_dict())
    autoremat.checkpoint(mine, budget=0.7, time_limit_seconds=0.2)
    return plain, mine
