"""What the tape costs on operators so small that nothing else matters: microseconds per operator.

A chain of small products, sines and views, trained plainly; under a dispatch mode that does nothing (what torch itself
takes to show every operator to Python); under a tape that keeps everything; under one with a plan for a smaller budget;
and under the same one ready to leave its path, as for a step that looks at its data. Processor time, the least of many
rounds, the variants taking turns.

Run: ``python benchmarks/tape.py [--rounds N]``.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import autoremat
from autoremat.record import record
from autoremat.run import Tape, instructions_for
from autoremat.run.instructions import Instructions

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    loss, x = chain(), torch.randn(WIDTH, WIDTH)
    program = record(loss, (x,))
    low = autoremat.solve(program, 0.7)

    def watched() -> Tensor:
        with Onlooker():
            return loss(x)

    def under(instructions: Instructions) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with Tape(instructions).forward():
                return loss(x)

        return forward

    seconds = seconds_of({
        "plain": lambda: loss(x),
        "a mode that does nothing": watched,
        "everything kept": under(instructions_for(autoremat.solve(program, 1.0))),
        "70 % of the plain peak": under(instructions_for(low)),
        "70 %, ready to leave the path": under(instructions_for(low, may_vary=True)),
    }, rounds)  # fmt: skip
    reruns, n = len(low.schedule.order) - len(program.ops), len(program.forward)
    print(f"{n} operators in the forward, {reruns} of them run again at 70 %")
    for name, value in seconds.items():
        more = (value - seconds["plain"]) / n
        print(f"  {name:30s} {value * 1e3:6.2f} ms a step, {more * 1e6:5.1f} us more per operator of the forward")


if __name__ == "__main__":
    main()
