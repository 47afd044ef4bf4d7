"""What the demo says: live progress, one table, one picture."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from autoremat.demo.train import Result, Row, Task, run_task, tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 36
"""Training steps of the demo when nothing else is asked for."""

_MEGA = 1e6
_COLORS = ("#8a8f98", "#d9822b", "#9ecae1", "#4292c6", "#08519c")


def run_demo(
    steps: int = STEPS, out: str | Path = "out", *, quick: bool = False, console: Console | None = None
) -> bool:
    """Train both tasks in every way, print the table, save the picture.

    Args:
        steps: training steps of every variant.
        out: folder for ``demo-memory.png``, or the path of a ``.png`` file.
        quick: tiny models, to see that everything works; the numbers mean little.
        console: where to print.

    Returns:
        Whether autoremat kept its promises: identical results and measured peaks within the budgets.

    Raises:
        ValueError: too few steps.
    """
    console = console or Console(highlight=False)
    picture = _picture_path(Path(out))
    start = time.perf_counter()
    console.print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.system()}"
    )
    results = [_train(task, steps, console) for task in tasks(quick)]
    console.print(table(results))
    console.print(summary(results))
    save_picture(results, picture)
    console.print(f"Picture of memory over the step: {picture}")
    console.print(f"Whole demo: {time.perf_counter() - start:.0f} s")
    return all(row.kept_promises for result in results for row in result.rows)


def _picture_path(out: Path) -> Path:
    """Choose the picture's path, and make its folder now.

    So a path that cannot be written fails before the training.
    """
    path = out if out.suffix == ".png" else out / "demo-memory.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _train(task: Task, steps: int, console: Console) -> Result:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console.print(f"[bold]{task.name}[/]: three plans are made in the first step")
    progress = Progress(*columns, console=console)
    bar = progress.add_task("  training in turns", total=steps, note="")

    def on_step(step: int, loss: float) -> None:
        progress.start()  # Not before the first step is over: autoremat shows a bar of its own while it plans.
        progress.update(bar, completed=step + 1, note=f"loss {loss:.3f}")

    try:
        return run_task(task, steps, on_step)
    finally:
        progress.stop()


def table(results: list[Result]) -> Table:
    """Lay out one line per variant, one section per task."""
    grid = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    grid.add_column("training", no_wrap=True)
    for name in ("budget\nMB", "predicted\npeak MB", "measured\npeak MB", "extra\ntime"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name in ("same\ngradients", "same\nstate"):
        grid.add_column(name, justify="center", no_wrap=True)
    grid.add_column("final\nloss", justify="right", no_wrap=True)
    for result in results:
        grid.add_row(f"[bold]{result.label}[/]")
        for row in result.rows:
            grid.add_row(*_cells(row, result.rows[0]))
        grid.add_section()
    return grid


def _cells(row: Row, plain: Row) -> tuple[str, ...]:
    is_plain = row is plain
    return (
        row.name,
        "" if row.budget_bytes is None else _megabytes(row.budget_bytes) + ("*" if row.at_floor else ""),
        "" if row.predicted_bytes is None else _megabytes(row.predicted_bytes),
        _megabytes(row.account.peak_bytes),
        "" if is_plain else f"{row.time_ratio - 1:+.1%}",
        "" if is_plain else _yes_no(row.same_gradients),
        "" if is_plain else _yes_no(row.same_state),
        f"{row.loss:.4f}",
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / _MEGA:.1f}"


def _yes_no(yes: bool) -> str:
    return "yes" if yes else "[bold red]no[/]"


def summary(results: list[Result]) -> str:
    """Say in words how the promises were kept."""
    rows = [row for result in results for row in result.rows if row.predicted_bytes]
    over = sum(row.account.peak_bytes > (row.budget_bytes or 0) for row in rows)
    different = sum(not (row.same_gradients and row.same_state) for row in rows)
    off = max((abs(row.account.peak_bytes / (row.predicted_bytes or 1) - 1) for row in rows), default=0.0)
    text = (
        f"autoremat: {over} of {len(rows)} runs above their budget, {different} of {len(rows)} not bit-identical to "
        f"plain training; measured and predicted peak differ by at most {off:.3%}.\n"
        "torch checkpoint: torch.utils.checkpoint around every block. Peaks are the allocator's own account of "
        "forward, backward and optimizer step. Extra time is the median over the steps of each step's time over the "
        "plain step beside it. Same: identical to plain training to the last bit; state: buffers and random generator."
    )
    return text + ("\n* the floor, as the budget asked for is below it" if any(r.at_floor for r in rows) else "")


def save_picture(results: list[Result], path: Path) -> None:
    """Draw memory over one step as the allocator saw it.

    There is one panel for each task.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), squeeze=False)[:, 0]
    for axes, result in zip(panels, results, strict=True):
        _draw(axes, result)
    figure.savefig(path, dpi=130)


def _draw(axes: Axes, result: Result) -> None:
    for row, color in zip(result.rows, _COLORS, strict=True):
        account = row.account
        moments = [100 * s / account.seconds[-1] for s in account.seconds]
        megabytes = [b / _MEGA for b in account.resident_bytes]
        label = f"{row.name}: peak {account.peak_bytes / _MEGA:.1f} MB"
        axes.step(moments, megabytes, where="post", color=color, linewidth=1.1, label=label)
        if row is result.rows[0]:
            axes.fill_between(moments, megabytes, step="post", color=color, alpha=0.15)
        if row.budget_bytes is not None:
            axes.axhline(row.budget_bytes / _MEGA, color=color, linewidth=0.9, linestyle="--")
    axes.set_title(result.name, loc="left", fontsize=10)
    axes.set_xlabel("percent of the step's time, under the profiler (dashed: budgets)")
    axes.set_ylabel("MB in memory, allocator's account")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
