"""What the tape costs on operators so small that nothing else matters: microseconds per call.

A chain of small products, sines and views, trained plainly; under a dispatch mode that does nothing (what torch itself
takes to show every operator to Python); under a function mode that does nothing (every call); following a plan that
keeps everything; and following one for a smaller budget. Then a GPT of operators of some 10 us, beside
``torch.utils.checkpoint`` of every block, at the peak that has. Processor time, the least of many rounds, the variants
taking turns. The functions that a step calls, in Python and in C, are counted, too: that is the same however busy the
machine is, so one version of autoremat can be compared with another.

Run: ``PYTHONPATH=. python benchmarks/tape.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import autoremat
from autoremat.engines.torch.eager.scripts import script_of
from autoremat.engines.torch.eager.tape import Tape
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.program import Plan
from tests.engines.torch.follow import recorded

LAYERS = 60
WIDTH = 16


class Onlooker(TorchDispatchMode):
    """Does nothing."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        return func(*args, **(kwargs or {}))


class Listener(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make one call."""
        return func(*args, **(kwargs or {}))


def chain() -> Callable[[Tensor], Tensor]:
    """The loss of a chain of small operators."""
    weights = [torch.randn(WIDTH, WIDTH, requires_grad=True) for _ in range(8)]

    def loss(x: Tensor) -> Tensor:
        for i in range(LAYERS):
            x = torch.sin(x) @ weights[i % 8]
            x = x.view(4, 4, WIDTH).transpose(0, 1).reshape(WIDTH, WIDTH) + x
        return x.sum()

    return loss


def seconds_of(forwards: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """The least seconds of a step, forward and backward, of each variant."""
    best = dict.fromkeys(forwards, float("inf"))
    gc.disable()
    try:
        for _ in range(rounds):
            for name, forward in forwards.items():
                begin = time.process_time()
                forward().backward()
                best[name] = min(best[name], time.process_time() - begin)
            gc.collect(0)
    finally:
        gc.enable()
    return best


def functions_called(forward: Callable[[], Tensor]) -> int:
    """How many functions a step calls, forward and backward; those of the profiler's own end among them."""
    forward().backward()
    profile = cProfile.Profile()
    gc.disable()
    try:
        with profile:
            forward().backward()
    finally:
        gc.enable()
    counts: dict[Any, tuple[int, int, float, float, Any]] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return sum(n for _, n, *_ in counts.values())


class Gpt(nn.Module):
    """Blocks of the usual kind, each checkpointed by torch where that is asked for."""

    def __init__(self, width: int, blocks: int, *, by_torch: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
            for _ in range(blocks)
        )
        self.head, self.by_torch = nn.Linear(width, 64), by_torch

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.by_torch else block(x)
        return self.head(x).square().mean()


def table(title: str, seconds: dict[str, float], n: int, unit: str) -> None:
    """Print what each variant takes more than the plain one."""
    plain = seconds["plain"]
    print(f"{title}: {n} {unit}, plain {plain * 1e3:.2f} ms")
    for name, value in seconds.items():
        more = value - plain
        print(f"  {name:34s} {more / plain:+7.1%}, {more / n * 1e6:5.1f} us more per {unit[:-1]}")


def of_chain(rounds: int) -> None:
    """The chain of small operators."""
    loss, x = chain(), torch.randn(WIDTH, WIDTH)
    program, path = recorded(loss, (x,), timing="measure")

    def under(around: Callable[[], Any]) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with around():
                return loss(x)

        return forward

    def at(share: float) -> Callable[[], Tensor]:
        script = script_of(autoremat.solve(program, share), path)
        return under(lambda: Tape(script).forward())

    seconds = seconds_of({
        "plain": lambda: loss(x),
        "a dispatch mode that does nothing": under(Onlooker),
        "a function mode that does nothing": under(Listener),
        "everything kept": at(1.0),
        "70 % of the plain peak": at(0.7),
    }, rounds)  # fmt: skip
    table("chain", seconds, len(path.calls), "calls")


def of_gpt(width: int, tokens: int, batch: int, rounds: int) -> None:
    """A GPT, at the peak that ``torch.utils.checkpoint`` of every block has."""
    x = torch.randn(batch, tokens, width)
    model, theirs = Gpt(width, 12, by_torch=False), Gpt(width, 12, by_torch=True)
    theirs.load_state_dict(model.state_dict())
    program, path = recorded(model, (x,), timing="measure")
    before = resident(model, x)
    peak = account(lambda: theirs(x).backward(), before).peak_bytes
    theirs.zero_grad()
    plans: dict[str, Plan] = {"everything kept": autoremat.solve(program, 1.0)}
    try:
        plans["at the peak of torch.utils.checkpoint"] = autoremat.solve(program, peak)
    except autoremat.InfeasibleBudget as error:
        plans["at the floor, which is higher"] = autoremat.solve(program, error.floor_bytes)

    def under(plan: Plan) -> Callable[[], Tensor]:
        script = script_of(plan, path)

        def forward() -> Tensor:
            with Tape(script).forward():
                return model(x)

        return forward

    variants = {name: under(plan) for name, plan in plans.items()}
    seconds = seconds_of({"plain": lambda: model(x), "torch.utils.checkpoint": lambda: theirs(x), **variants}, rounds)
    table(f"GPT of width {width}, {tokens} tokens, batch {batch}", seconds, len(path.calls), "calls")
    plain = functions_called(lambda: model(x))
    for name, forward in variants.items():
        print(f"  {name:37s} {functions_called(forward) - plain:7,d} more functions called than in a plain step")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    of_chain(rounds)
    of_gpt(32, 16, 2, rounds)
    of_gpt(64, 32, 4, rounds)


if __name__ == "__main__":
    main()
