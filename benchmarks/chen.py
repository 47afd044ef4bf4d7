"""The two results of Chen et al. 2016, section 5, by shapes: nothing is trained, nothing of their size is allocated.

"Training Deep Nets with Sublinear Memory Cost" trains a residual network of 1,000 layers on 224 x 224 images, batch 32,
with 7 GB of feature maps instead of 48 GB, for 30 % extra time; and an LSTM of 4 layers with 1,024 hidden units over 64
steps, batch 64, with less than a quarter. Here both are recorded on the meta device and planned for feature maps alone:
what the forward makes counts, parameters, gradients and scratch do not. The last column has the peak with everything.
Run: ``python benchmarks/chen.py [picture.png]``; takes some minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from autoremat.engines.torch.eager.dry_run import record
from autoremat.planner import Frontier, frontier, solve
from autoremat.program import Program, simulate
from autoremat.show.plots import draw_frontier
from autoremat.show.text import format_bytes

SHARES = (1.0, 0.5, 0.3, 0.2, 7 / 48, 0.12, 0.1, 0.085, 0.07, 0.06, 0.05, 0.04)
"""Feature maps as shares of the plain ones."""

SECONDS = 240.0
"""Time for the frontier of one program."""


class Bottleneck(nn.Module):
    """Pre-activation bottleneck (He et al. 2016): three convolutions, each after batch norm and ReLU."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(i) for i, _, _, _ in sizes)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return y + self.shortcut(x)


class DeepResNet(nn.Module):
    """The ImageNet shape with bottlenecks; 3 layers per bottleneck and 2 more."""

    def __init__(self, units: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1))
        blocks, inputs = [], 64
        for stage, count in enumerate(units):
            for k in range(count):
                blocks.append(Bottleneck(inputs, 64 << stage, 2 if stage and not k else 1))
                inputs = 256 << stage
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.BatchNorm2d(inputs), nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class LSTM(nn.Module):
    """Unrolled, every gate an operator of its own; a loss at every step, as in language models."""

    def __init__(self, width: int = 1024, layers: int = 4, classes: int = 1024) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[steps, batch, width]`` to scores of every step."""
        state = [(x.new_zeros(x.shape[1:]), x.new_zeros(x.shape[1:])) for _ in self.layers]
        outputs = []
        for below in x:
            for k, gates in enumerate(self.layers):
                h, c = state[k]
                i, f, g, o = gates(torch.cat([below, h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                below = o.sigmoid() * c.tanh()
                state[k] = below, c
            outputs.append(self.head(below))
        return torch.stack(outputs)


def resnet1001() -> Program:
    """The proportions of ResNet-152 with 333 bottlenecks: 1,001 layers."""
    with torch.device("meta"):
        model = DeepResNet((20, 53, 240, 20))
        x, y = torch.empty(32, 3, 224, 224), torch.empty(32, dtype=torch.int64)
    return record(lambda: F.cross_entropy(model(x), y), timing="estimate", name="ResNet, 1,001 layers")


def lstm() -> Program:
    """4 layers, 1,024 hidden, 64 steps, batch 64."""
    with torch.device("meta"):
        model = LSTM()
        x, y = torch.empty(64, 64, 1024), torch.empty(64, 64, dtype=torch.int64)
    return record(
        lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()), timing="estimate", name="LSTM, 4 x 64 steps"
    )


def feature_maps(program: Program) -> Program:
    """The same step, with bytes only for what the forward makes."""
    producers = [program.ops[p].phase if p >= 0 else "" for p in program.producer]
    sizes = [v.nbytes if phase == "forward" else 0 for v, phase in zip(program.values, producers, strict=True)]
    values = tuple(replace(v, nbytes=n) for v, n in zip(program.values, sizes, strict=True))
    return replace(program, values=values, ops=tuple(replace(op, scratch_bytes=0) for op in program.ops))


def study(program: Program) -> Frontier:
    """Plan at all shares that are feasible, and at the floor."""
    whole = solve(program, 1.0)
    floor = whole.floor_bytes
    budgets = [int(share * whole.plain_peak_bytes) for share in SHARES]
    return frontier(program, points=[floor, *(b for b in budgets if b > floor)], time_limit_seconds=SECONDS)


def table(program: Program, front: Frontier) -> str:
    """Feature maps in bytes and as a share, extra time, bound; and how low it goes at 30 %."""
    plain = front.plain_peak_bytes
    lines = [
        f"{program.name}: {len(program.ops)} ops; plain feature maps {format_bytes(plain)}, "
        f"peak {format_bytes(simulate(program).peak_bytes)}"
    ]
    for p in reversed(front.points):
        peak = simulate(program, p.schedule).peak_bytes
        lines.append(
            f"  {format_bytes(p.peak_bytes):>9}  {p.peak_bytes / plain:6.1%}  extra time {p.overhead:+7.1%}"
            f"  none below {p.lower_bound:+6.1%}  peak {format_bytes(peak):>9}"
        )
    low = next(p for p in front.points if p.overhead <= 0.3).peak_bytes
    lines.append(f"  at most 30 % extra time: down to {format_bytes(low)}, 1/{plain / low:.1f}")
    return "\n".join(lines)


def main(picture: str = "") -> None:
    """Print a table for each; draw both where a path is given."""
    makers: tuple[Callable[[], Program], ...] = (resnet1001, lstm)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, make in zip(figure.subplots(1, 2), makers, strict=True):
        begin = time.perf_counter()
        program = make()
        recorded = time.perf_counter()
        front = study(feature_maps(program))
        print(table(program, front))
        print(f"  recorded in {recorded - begin:.0f} s, planned in {time.perf_counter() - recorded:.0f} s", flush=True)
        draw_frontier(axes, front)
        axes.set_xlabel("feature maps at their peak, MB")
    if picture:
        figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:2])
