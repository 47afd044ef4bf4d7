"""What it costs that calls run again from their first op on: op by op against call by call, at three budgets.

The overhead if every op could run again by itself, if prefixes of calls do, and if only whole calls do: for the
networks of the tests, a Llama under bf16 autocast and a vision transformer with ``nn.MultiheadAttention``, or for
programs from JSON files. Seconds of operators are estimated, so the figures are the same on every machine.

Run: ``PYTHONPATH=. python benchmarks/granularity.py [step.json ...] [--seconds 10]``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat import InfeasibleBudget, Program, solve
from autoremat.api import record_step
from benchmarks._gpu_networks import Llama, LlamaConfig
from tests.zoo import CASES

SHARES = (0.7, 0.5, 0.35)


class VisionTransformer(nn.Module):
    """Patches, blocks of ``nn.MultiheadAttention`` whose weights are asked for, a head."""

    def __init__(self, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, width, 8, 8), nn.Linear(width, 10)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 4, 0.1, batch_first=True) for _ in range(blocks))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.wide = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, S, S]`` to logits ``[B, 10]``."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        for i, (attention, wide) in enumerate(zip(self.attention, self.wide, strict=True)):
            y = self.norm[2 * i](x)
            x = x + attention(y, y, y)[0]
            x = x + wide(self.norm[2 * i + 1](x))
        return self.head(x.mean(1))


def programs() -> Iterator[Program]:
    """The steps of all networks."""
    for case in CASES:
        torch.manual_seed(0)
        model = case.model()
        yield record_step(case.loss(model), case.inputs(), {}, None, "estimate", name=case.name)
    llama, tokens = Llama(LlamaConfig(4, 64, 4, 2, 172, 256, 64)), torch.randint(0, 256, (8, 64))
    vit, images = VisionTransformer(), torch.randn(8, 3, 64, 64)

    def next_token(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(llama(x).flatten(0, 1), x.flatten())

    def label(x: Tensor) -> Tensor:
        return F.cross_entropy(vit(x), torch.arange(len(x)))

    yield record_step(next_token, (tokens,), {}, None, "estimate", name="Llama, bf16 autocast")
    yield record_step(label, (images,), {}, None, "estimate", name="vision transformer")


def op_by_op(program: Program) -> Program:
    """The program without its calls."""
    ops = tuple(replace(op, call=-1) for op in program.ops)
    return replace(program, values=tuple(replace(v, available=None) for v in program.values), ops=ops)


def whole_calls(program: Program) -> Program:
    """The program whose calls hand nothing out before their end."""
    last = {begin: i for i, begin in enumerate(program.call_begin)}
    values = tuple(
        replace(v, available=last[program.call_begin[p]])
        if p >= 0 and program.ops[p].call >= 0 and (v.available is None or v.available >= 0)
        else v
        for p, v in zip(program.producer, program.values, strict=True)
    )
    return replace(program, values=values)


def overhead(program: Program, share: float, seconds: float) -> str:
    """Extra time in percent with its lower bound, or the floor as a share of the plain peak."""
    try:
        plan = solve(program, share, time_limit_seconds=seconds)
    except InfeasibleBudget as error:
        return f"floor {error.floor_bytes / solve(program, 1.0).plain_peak_bytes:.2f}"
    return f"{100 * plan.overhead:.1f} (>= {100 * plan.lower_bound:.1f})"


def rows_of(program: Program, seconds: float) -> list[list[str]]:
    """Name and kind of planning, then a figure for every share."""
    kinds = {"ops": op_by_op(program), "prefixes": program, "whole calls": whole_calls(program)}
    return [[program.name, kind, *(overhead(p, share, seconds) for share in SHARES)] for kind, p in kinds.items()]


def table(programs: Sequence[Program], seconds: float) -> str:
    """All figures as a table."""
    head = ["network", "again", *(f"{share:.0%}" for share in SHARES)]
    rows = [head, *(row for program in programs for row in rows_of(program, seconds))]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for the files named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="programs; none: the networks")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each plan")
    options = parser.parse_args(arguments)
    found = [Program.from_json(path) for path in options.files] or list(programs())
    print(table(found, options.seconds))


if __name__ == "__main__":
    main()
