"""Every strategy at seven budgets, on recorded models: extra time, beside the lower bound.

The models are recorded on fake tensors with estimated seconds: a GPT of 24 blocks, the shape of ResNet-50, and the
networks of the tests. "-" stands where a strategy has no schedule within the budget.
Run: ``python benchmarks/strategies.py [picture.png]``; takes some minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from autoremat.demo.models import GPT, GPTConfig
from autoremat.engines.torch.eager.dry_run import record
from autoremat.planner import SOLVERS, solve
from autoremat.program import InfeasibleBudget, Program
from benchmarks.chen import DeepResNet
from tests.zoo import CASES, Case

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Budgets as shares of the plain peak."""

STRATEGIES = tuple(solver for solver in SOLVERS if solver != "exact")
"""``exact`` is for programs of about a hundred ops."""

SECONDS = 10.0
"""Time for one plan."""


@dataclass(frozen=True)
class Row:
    """What one strategy costs at each budget; None where it has no schedule."""

    solver: str
    overheads: tuple[float | None, ...]


def gpt24() -> Program:
    """GPT, 24 blocks, width 128, 8 sequences of 128 bytes."""
    model = GPT(GPTConfig(blocks=24, width=128, context=128))
    x, y = (torch.randint(0, 256, (8, 128)) for _ in range(2))
    return _recorded("GPT, 24 blocks", lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def resnet50() -> Program:
    """16 bottlenecks on 8 images of 224 x 224."""
    with torch.device("meta"):
        model: nn.Module = DeepResNet((3, 4, 6, 3))
        x, y = torch.empty(8, 3, 224, 224), torch.empty(8, dtype=torch.int64)
    return _recorded("ResNet-50", lambda: F.cross_entropy(model(x), y))


def of_the_zoo(case: Case) -> Callable[[], Program]:
    """A network of the tests."""

    def make() -> Program:
        loss, inputs = case.loss(case.model()), case.inputs()
        return _recorded(case.name, lambda: loss(*inputs))

    return make


def _recorded(name: str, step: Callable[[], Tensor]) -> Program:
    return record(step, timing="estimate", name=name)


def rows_of(program: Program) -> list[Row]:
    """The lower bound, then every strategy."""
    found: dict[str, list[float | None]] = {"lower bound": [], **{solver: [] for solver in STRATEGIES}}
    for share in SHARES:
        bound = None
        for solver in STRATEGIES:
            try:
                plan = solve(program, share, solver=solver, time_limit_seconds=SECONDS)
            except InfeasibleBudget:
                found[solver].append(None)
                continue
            bound = max(bound or 0.0, plan.lower_bound)
            found[solver].append(plan.overhead)
        found["lower bound"].append(bound)
    return [Row(solver, tuple(overheads)) for solver, overheads in found.items()]


def table(program: Program, rows: list[Row], seconds: float) -> Table:
    """Rows are strategies, columns budgets."""
    shown = Table(title=f"{program.name}: {len(program.ops)} ops, {seconds:.0f} s", box=box.SIMPLE_HEAD)
    shown.add_column("extra time within")
    for share in SHARES:
        shown.add_column(f"{share:.0%}", justify="right")
    for row in rows:
        shown.add_row(row.solver, *("-" if x is None else f"{x:+.1%}" for x in row.overheads))
    return shown


def losses(rows: list[Row]) -> int:
    """At how many budgets some strategy beats ``auto``."""
    (auto,) = (row for row in rows if row.solver == "auto")
    others = [row for row in rows if row.solver not in ("auto", "lower bound")]
    known = [[x for x in column if x is not None] for column in zip(*(r.overheads for r in others), strict=True)]
    return sum(
        bool(column) and (mine is None or min(column) < mine - 1e-9)
        for mine, column in zip(auto.overheads, known, strict=True)
    )


def draw(results: list[tuple[Program, list[Row]]], path: str) -> None:
    """A panel per model."""
    columns = 3
    figure = Figure(figsize=(13, 3.4 * ceil(len(results) / columns)), layout="constrained")
    panels = figure.subplots(ceil(len(results) / columns), columns, squeeze=False).flat
    for (program, rows), axes in zip(results, panels, strict=False):
        for row in rows:
            y = [float("nan") if x is None else 100 * x for x in row.overheads]
            bound = row.solver == "lower bound"
            axes.plot(SHARES, y, "k:" if bound else "o-", markersize=3, linewidth=1, label=row.solver)
        axes.set_title(program.name, fontsize=9)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("budget, share of the plain peak", fontsize=8)
        axes.set_ylabel("extra time, %", fontsize=8)
    figure.axes[0].legend(fontsize=7)
    for axes in list(panels):
        axes.set_visible(False)
    figure.savefig(path, dpi=100)


def main(picture: str = "") -> None:
    """Print a table per model; draw all where a path is given."""
    console, results = Console(width=110), list[tuple[Program, list[Row]]]()
    for make in (gpt24, resnet50, *map(of_the_zoo, CASES)):
        program, begin = make(), time.perf_counter()
        rows = rows_of(program)
        results.append((program, rows))
        console.print(table(program, rows, time.perf_counter() - begin))
        console.print(f"beaten at {losses(rows)} of {len(SHARES)} budgets\n")
    if picture:
        draw(results, picture)


if __name__ == "__main__":
    main(*sys.argv[1:2])
