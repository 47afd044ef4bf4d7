"""autoremat beside ``torch.utils.checkpoint`` around every block, in one run.

For each network: with the budget set to the peak that checkpointing every block reaches, how much of its extra time
autoremat needs; with the extra time that checkpointing takes, how much of its peak. And what the tape costs by itself,
when everything is kept. Peaks by the allocator's account; times interleaved, median of the rounds.

Run: ``python benchmarks/beside_checkpoint.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _side_by_side import Step, keep_memory, seconds_of
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig, checkpoint_every_block
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.program import Plan
from autoremat.show.text import format_bytes
from tests.engines.torch.follow import following, recorded


@dataclass(frozen=True)
class Network:
    """A network and its step."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], Callable[..., Tensor]]
    inputs: tuple[Tensor, ...]


def networks() -> tuple[Network, ...]:
    """The two networks of the comparison."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(blocks=6, width=384, heads=6, context=256, dropout=0.2))
    tokens = torch.randint(0, 256, (2, 8, 256))
    resnet = ResNet(ResNetConfig(widths=(24, 48, 96), blocks_per_stage=3))
    return (
        Network("GPT", gpt, _next_token, (tokens[0], tokens[1])),
        Network("ResNet", resnet, _classify, (torch.randn(64, 1, 32, 32), torch.randint(0, 10, (64,)))),
    )


def _next_token(model: nn.Module) -> Callable[..., Tensor]:
    return lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _classify(model: nn.Module) -> Callable[..., Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y)


def steps_of(network: Network, budgets: Mapping[str, int]) -> dict[str, tuple[nn.Module, Step]]:
    """Plain, every block, and autoremat at each budget: each with a model of its own."""
    plain, blocks = copy.deepcopy(network.model), checkpoint_every_block(copy.deepcopy(network.model))
    steps = {
        "plain": (plain, _step(network.loss(plain), network)),
        "block": (blocks, _step(network.loss(blocks), network)),
    }
    for name, budget in budgets.items():
        model = copy.deepcopy(network.model)
        steps[name] = (model, _step(autoremat.checkpoint(network.loss(model), budget=budget), network))
    return steps


def _step(loss: Callable[..., Tensor], network: Network) -> Step:
    return lambda: loss(*network.inputs).backward()


def peak_of(network: Network, model: nn.Module, step: Step) -> int:
    """The peak of a step by the allocator's account."""
    step()
    model.zero_grad()
    return account(step, resident(model, *network.inputs)).peak_bytes


def medians(steps: Mapping[str, tuple[nn.Module, Step]], rounds: int) -> dict[str, float]:
    """Median seconds of every step, the steps taking turns."""
    return {name: statistics.median(s) for name, s in seconds_of(steps, rounds).items()}


def extra(seconds: Mapping[str, float], name: str) -> float:
    """Extra time over the plain step, as a fraction of it."""
    return seconds[name] / seconds["plain"] - 1


def compare(network: Network, rounds: int) -> None:
    """Print the comparison for one network."""
    first = steps_of(network, {})
    peaks = {name: peak_of(network, model, step) for name, (model, step) in first.items()}
    shares = (1.0, 0.8)
    budgets = {f"autoremat at {s:.0%}": int(s * peaks["block"]) for s in shares}
    budgets = {name: b for name, b in budgets.items() if _feasible(network, b)}
    steps = steps_of(network, budgets)
    peaks |= {name: peak_of(network, *steps[name]) for name in budgets}
    seconds = medians(steps, rounds)
    print(f"\n{network.name}: plain peak {format_bytes(peaks['plain'])}, plain step {seconds['plain'] * 1e3:.0f} ms")
    for name in ("block", *budgets):
        x = extra(seconds, name)
        print(
            f"  {name:18s} peak {format_bytes(peaks[name]):>9s} ({peaks[name] / peaks['block']:.2f} of every block)  "
            f"extra time {x:6.1%} ({x / extra(seconds, 'block'):.2f} of every block)"
        )


def _feasible(network: Network, budget: int) -> bool:
    try:
        autoremat.plan(network.loss(network.model), *network.inputs, budget=budget, timing="measure")
    except autoremat.InfeasibleBudget:
        return False
    return True


def tape_cost(network: Network, rounds: int) -> None:
    """Print what the tape costs when it keeps everything."""
    loss = network.loss(network.model)
    program, path = recorded(loss, network.inputs, timing="measure")
    plan: Plan = autoremat.solve(program, 1.0)

    def taped() -> Any:
        with following(plan, path).forward():
            value = loss(*network.inputs)
        return value.backward()

    seconds = medians({"plain": (network.model, _step(loss, network)), "taped": (network.model, taped)}, rounds)
    print(f"\n{network.name}, everything kept: the tape costs {extra(seconds, 'taped'):.1%} of the step")


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    keep_memory()
    for network in networks():
        compare(network, rounds)
    tape_cost(networks()[0], rounds)


if __name__ == "__main__":
    main()
