"""What a compiled step takes: torch's own ways beside a budget, in bytes by the allocator's account.

Plain ``torch.compile``, every point of ``activation_memory_budget``, ``torch.compile`` around
``torch.utils.checkpoint`` for each block, and budgets: the peak of what checkpointing by block takes is one of them, so
that both stand side by side at the same peak. ``--times`` adds ratios of times: all variants take turns in one process,
and the median of the ratios to plain ``torch.compile`` counts. Compiling takes long; the network is small.

Run: ``PYTHONPATH=. python benchmarks/compiled.py [--backend inductor] [--network gpt] [--times]``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autoremat
from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig
from autoremat.engines.torch.world.memory_account import account, resident

POINTS = (0.7, 0.5, 0.3, 0.1)
SHARES = (0.8, 0.6, 0.45, 0.3)
ROUNDS = 9


class Training(nn.Module):
    """A network with its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.network(x).flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Variant:
    """One way to run the step.

    Attributes:
        name: of the way.
        step: runs it once.
        peak_bytes: what it takes.
        note: what else there is to say.
    """

    name: str
    step: Callable[[], None]
    peak_bytes: int
    note: str = ""


def network_of(name: str, blocks: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, with its inputs and targets."""
    torch.manual_seed(0)
    if name == "gpt":
        gpt = GPT(GPTConfig(blocks=blocks, width=64, heads=4, context=64))
        return gpt, torch.randint(0, 256, (8, 64)), torch.randint(0, 256, (8, 64))
    net = ResNet(ResNetConfig(widths=(8, 16), blocks_per_stage=blocks // 2, dropout=0.0))
    return net, torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,))


def by_block(training: nn.Module) -> nn.Module:
    """The same, each block under ``torch.utils.checkpoint``."""
    for block in (m for m in training.modules() if type(m).__name__ in ("Block", "PreActBlock")):
        block.forward = _checkpointed(block.forward)  # type: ignore[method-assign]
    return training


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def measured(name: str, training: nn.Module, call: Callable[..., Tensor], x: Tensor, y: Tensor) -> Variant:
    """A variant, run twice to warm up and once to measure."""

    def step() -> None:
        for parameter in training.parameters():
            parameter.grad = None
        call(x, y).backward()

    step()
    step()
    for parameter in training.parameters():
        parameter.grad = None
    peak = account(lambda: call(x, y).backward(), resident(training, x, y)).peak_bytes
    found = autoremat.stats(call) if name.startswith("autoremat") else None
    note = "" if found is None or found.plan is None else f"budget {found.plan.budget_bytes / 1e6:.3f} MB"
    return Variant(name, step, peak, note)


def variants(backend: str, name: str, blocks: int) -> list[Variant]:
    """All ways to run the step, one after the other; each is said as it is there."""
    network, x, y = network_of(name, blocks)
    base, found = Training(network), list[Variant]()

    def add(label: str, training: nn.Module, call: Callable[..., Tensor] | None = None) -> int:
        torch._dynamo.reset()
        try:
            if call is None:
                call = torch.compile(training, backend=backend)
            variant = measured(label, training, call, x, y)
        except autoremat.InfeasibleBudget as error:
            print(f"| {label} | refused: floor {error.floor_bytes / 1e6:.3f} MB | | |", flush=True)
            return error.floor_bytes
        found.append(variant)
        share = variant.peak_bytes / found[0].peak_bytes
        print(f"| {label} | {variant.peak_bytes / 1e6:.3f} | {share:.2f} | {variant.note} |", flush=True)
        return variant.peak_bytes

    def fresh() -> nn.Module:
        return copy.deepcopy(base)

    print("| variant | peak MB | share | |\n| --- | --- | --- | --- |")
    eager = fresh()
    add("eager", eager, eager)
    full = add("torch.compile", fresh())
    block = add("torch.compile, checkpoint by block", by_block(fresh()))
    for budget in (block, *(int(share * full) for share in SHARES)):
        training = fresh()
        call = torch.compile(autoremat.checkpoint(training, budget=budget), backend=backend)
        add(f"autoremat, budget {budget / 1e6:.3f} MB", training, call)
    for point in POINTS:
        with torch._functorch.config.patch(activation_memory_budget=point):
            add(f"activation_memory_budget {point}", fresh())
    return found


def ratios(found: list[Variant]) -> None:
    """Times over that of plain ``torch.compile``, medians of rounds in which all take turns."""
    times: dict[str, list[float]] = {v.name: [] for v in found}
    for _ in range(ROUNDS):
        for variant in found:
            begin = time.process_time()
            variant.step()
            times[variant.name].append(time.process_time() - begin)
    plain = times["torch.compile"]
    for name, mine in times.items():
        print(f"{name:40} {statistics.median(a / b for a, b in zip(mine, plain, strict=True)):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--network", default="gpt", choices=("gpt", "resnet"))
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--times", action="store_true")
    asked = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100
    ran = variants(asked.backend, asked.network, asked.blocks)
    if asked.times:
        ratios(ran)
