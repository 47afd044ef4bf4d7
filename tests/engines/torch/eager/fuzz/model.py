"""The module that a script describes, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.engines.torch.eager.fuzz.operations import OPS, REGIONS
from tests.engines.torch.eager.fuzz.scripts import WIDTH, Do, If, Instruction, Script, leaves_of


class Block(nn.Module):
    """A module within the module."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.norm = linear, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(F.gelu(self.linear(self.norm(x))), 0.2, self.training)


PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "conv": lambda m: nn.Conv1d(WIDTH, WIDTH, 3, padding=1),
    "batch_norm": lambda m: nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, momentum=None)]),
    "layer_norm": lambda m: nn.LayerNorm(WIDTH),
    "embedding": lambda m: nn.Embedding(4, WIDTH),
    "gru": lambda m: nn.GRU(WIDTH, WIDTH),
    "block": lambda m: Block(m.linears[0]),
    "checkpoint": lambda m: Block(m.linears[1]),
}
"""Modules that ops of the same name use."""


class Interruption(Exception):
    """Not an error of torch's."""


class Model(nn.Module):
    """Runs the body of a script."""

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        for name in {i.op for i in leaves_of(script.body)}.intersection(PARTS):
            setattr(self, name, PARTS[name](self))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("level", torch.ones(()))
        self.generator = torch.Generator().manual_seed(3)
        self.kept: list[Tensor] = [torch.zeros(()), torch.ones(())]
        self.fails_at = -1

    def forward(self, x: Tensor, y: Tensor) -> Any:
        h = self.linears[0](x)
        pool = [x, y, h, h[: 1 + x.size(0) // 2], h.t()]
        self.run(self.script.body, pool)
        found = [pool[s] for s in self.script.slots]
        loss = loss_of(pool) + self.scale.square()
        del pool, h
        return RETURNS[self.script.returns](loss, found)

    def run(self, body: tuple[Instruction, ...], pool: list[Tensor]) -> None:
        for n, i in enumerate(body):
            if n == self.fails_at:
                raise Interruption
            if isinstance(i, Do):
                pool[i.to] = OPS[i.op](self, pool[i.a], pool[i.b], i.k)
            elif isinstance(i, If):
                self.run(i.then if pool[i.on].detach().float().mean() > 0 else i.otherwise, pool)
            else:
                with REGIONS[i.region]():
                    self.run(i.body, pool)


def loss_of(tensors: list[Tensor]) -> Tensor:
    """A number that depends on every element of what is differentiable."""
    return sum((t.float().tanh().square().mean() for t in tensors if t.requires_grad), torch.zeros(()))


RETURNS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "loss": lambda loss, found: loss,
    "tuple": lambda loss, found: (loss, *found, found[0].detach()),
    "dict": lambda loss, found: {"loss": loss, "found": found, "n": len(found), "nothing": None},
    "tensors": lambda loss, found: [*found, loss + 1, {"again": (found[0], found[-1])}],
}


def objective(result: Any, k: int) -> Tensor:
    """What the backward starts from: everything returned that is differentiable, or a part of it."""
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    tensors = tensors if k % 2 == 0 else tensors[:1] if k % 4 == 1 else tensors[::-1][:1]
    return sum((t.float().sum() if t.numel() == 1 else t.float().sin().mean() for t in tensors), torch.zeros(()))
