"""A GPT of 1,000 blocks and an LSTM over 10,000 steps: plans for programs that repeat themselves.

Sixteen blocks of the GPT and sixteen steps of the LSTM are recorded, on fake tensors, with estimated seconds; they are
folded, and as many repetitions as are meant are planned: extra time, bound, peak, seconds of the processor and the
memory of the process. Where all ops can be written out, the plan is unfolded, and its peak and extra time simulated.
Run: ``python benchmarks/repeated.py [BLOCKS STEPS]``; some minutes.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat.demo.models import GPT, GPTConfig
from autoremat.engines.torch.eager.dry_run import record
from autoremat.planner.repeated import solve_repeated
from autoremat.program import InfeasibleBudget, Program, simulate
from autoremat.program.repeats import Repeated, fold

SHARES = (0.7, 0.5, 0.3)
RECORDED = 16
MOST_OPS = 100_000
"""Ops that are written out to be simulated."""


class Recurrent(nn.Module):
    """Two LSTM layers, every gate an operator of its own; the loss of every step is added to the sum."""

    def __init__(self, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(layers))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        """The sum of the losses of all steps, which all have the input ``[batch, width]``."""
        state = [(torch.zeros_like(x), torch.zeros_like(x)) for _ in self.layers]
        total = x.new_zeros(())
        for _ in range(steps):
            below = x
            for k, gates in enumerate(self.layers):
                h, c = state[k]
                i, f, g, o = gates(torch.cat([below, h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                below = o.sigmoid() * c.tanh()
                state[k] = below, c
            total = total + self.head(below).square().mean()
        return total


def gpt(blocks: int) -> Program:
    """A GPT, width 256, 8 sequences of 256."""
    model = GPT(GPTConfig(blocks=blocks, width=256, context=256))
    x, y = (torch.randint(0, 256, (8, 256)) for _ in range(2))
    return record(lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), timing="estimate", name="GPT")


def lstm(steps: int) -> Program:
    """The recurrence, batch 64."""
    model, x = Recurrent(), torch.randn(64, 256)
    return record(lambda: model(x, steps), timing="estimate", name="LSTM")


def rows_of(folded: Repeated) -> None:
    """Print a row for every budget."""
    for share in SHARES:
        begin = time.process_time()
        try:
            plan = solve_repeated(folded, share)
        except InfeasibleBudget as error:
            print(f"{folded.program.name:5s} {folded.ops:9,d} {share:5.0%}  -  floor {error.floor_bytes:,}")
            continue
        seconds = time.process_time() - begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        exact = ""
        if folded.ops <= MOST_OPS:
            unfolded = plan.unfold()
            timeline = simulate(unfolded.program, unfolded.schedule)
            overhead = timeline.extra_seconds / unfolded.program.seconds
            same = timeline.peak_bytes == plan.peak_bytes and abs(overhead - plan.overhead) < 1e-9
            exact = "the same" if same else "NOT THE SAME"
        print(
            f"{folded.program.name:5s} {folded.ops:9,d} {share:5.0%} {plan.overhead:8.3%} {plan.lower_bound:8.3%} "
            f"{seconds:6.1f} s {memory:5.2f} GB  {exact}",
            flush=True,
        )


def main(blocks: int, steps: int) -> None:
    """Print the table."""
    print("           ops budget    extra    bound    time    memory  unfolded")
    for program, times in ((gpt(RECORDED), blocks), (lstm(RECORDED), steps)):
        folded = fold(program)
        if folded is None:
            print(f"{program.name}: nothing repeats itself")
            continue
        rows_of(replace(folded, times=times))


if __name__ == "__main__":
    main(*(int(n) for n in sys.argv[1:3]) if len(sys.argv) > 2 else (1000, 10_000))
