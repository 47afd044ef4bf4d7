"""Whether a compiled step stays within its budget: five budgets each for five networks, from mild to the floor.

The floor is what a budget of one byte is refused with. The budgets lie between the peak of plain ``torch.compile`` and
that floor, the last one is the floor itself. A row says what Inductor's schedule foretells, and what the allocator
counts. Every budget must be kept; none of them may be refused. The last column is the error of the gradients beside
those of plain ``torch.compile``, in float32.

Run: ``PYTHONPATH=. python benchmarks/compiled_budgets.py [gpt resnet unet llama decoder] [--backend aot_eager]``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig
from tests.engines.torch.compiled.cases import WithLoss, peak
from tests.engines.torch.compiled.zoo import EncoderDecoder, Llama, UNet

Data = tuple[Tensor, Tensor]
PARTS = (0.8, 0.5, 0.25, 0.1, 0.0)
"""Where budgets lie between the floor and the peak of plain ``torch.compile``."""


def tokens(n: int, length: int, words: int) -> Data:
    """Sentences, and what is to follow each of their words."""
    return torch.randint(0, words, (n, length)), torch.randint(0, words, (n, length))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Data]]] = {
    "gpt": lambda: (
        WithLoss(GPT(GPTConfig(blocks=8, width=32, heads=2, context=32))), tokens(4, 32, 256),
    ),
    "resnet": lambda: (
        WithLoss(ResNet(ResNetConfig(widths=(8, 16), blocks_per_stage=2, dropout=0.0))),
        (torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))),
    ),
    "unet": lambda: (UNet(8), (torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16))),
    "llama": lambda: (WithLoss(Llama(blocks=4, width=32, heads=2)), tokens(4, 32, 128)),
    "decoder": lambda: (EncoderDecoder(32), (torch.randn(4, 16, 32), torch.randn(4, 16, 32))),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A budget, and what became of it."""

    budget: int
    foretold: int
    measured: int
    error: float
    runs_again: int
    seconds: float

    @property
    def is_kept(self) -> bool:
        """Whether the step stayed within the budget."""
        return self.measured <= self.budget


def gradients(model: nn.Module, call: Callable[..., Tensor], data: Data) -> list[Tensor]:
    """The gradients of a step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    call(*data).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distance(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two gradients, over the largest number in them."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(mine, theirs, strict=True))


def run(base: nn.Module, data: Data, backend: str, budget: int, right: list[Tensor]) -> Row:
    """A step within a budget."""
    torch._dynamo.reset()
    model, begin = copy.deepcopy(base), time.process_time()
    call = torch.compile(autoremat.checkpoint(model, budget=budget, time_limit_seconds=2), backend=backend)
    mine = gradients(model, call, data)
    seconds = time.process_time() - begin
    stats: Any = autoremat.stats(model)
    return Row(
        budget, stats.scheduled_peak_bytes, peak(model, call, data), distance(mine, right), stats.reruns, seconds,
    )  # fmt: skip


def floor_of(base: nn.Module, data: Data, backend: str) -> int:
    """What a budget of one byte is refused with."""
    torch._dynamo.reset()
    try:
        autoremat.plan(copy.deepcopy(base), *data, budget=1, compiled=backend, time_limit_seconds=2)
    except autoremat.InfeasibleBudget as error:
        return error.floor_bytes
    raise AssertionError("a byte was enough")


def sweep(name: str, backend: str) -> bool:
    """All budgets of a network; whether all were kept."""
    torch.manual_seed(0)
    base, data = NETWORKS[name]()
    torch._dynamo.reset()
    plain = copy.deepcopy(base)
    call = torch.compile(plain, backend=backend)
    right, top = gradients(plain, call, data), peak(plain, call, data)
    floor, good = floor_of(base, data, backend), True
    print(f"| {name} | torch.compile | | {top / 1e6:.3f} | | | |", flush=True)
    for part in PARTS:
        budget = floor + int(part * (top - floor))
        try:
            row = run(base, data, backend, budget, right)
        except autoremat.InfeasibleBudget as error:
            print(f"| {name} | {budget / 1e6:.3f} | REFUSED: floor {error.floor_bytes / 1e6:.3f} | | | | |", flush=True)
            good = False
            continue
        good = good and row.is_kept
        figures = f"{row.budget / 1e6:.3f} | {row.foretold / 1e6:.3f} | {row.measured / 1e6:.3f}"
        also = f"{row.measured / row.foretold:.3f} | {row.runs_again} | {row.error:.0e} | {row.seconds:.0f} s"
        print(f"| {name} | {figures} | {also} |{'' if row.is_kept else ' EXCEEDED'}", flush=True)
    return good


def main() -> None:
    """Sweep networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--backend", default="inductor")
    asked = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100
    print("| network | budget | foretold | measured | share | runs again | error | |\n" + "| --- " * 8 + "|")
    kept = [sweep(name, asked.backend) for name in asked.networks]
    raise SystemExit(not all(kept))


if __name__ == "__main__":
    main()
