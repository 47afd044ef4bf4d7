"""A plan in pictures.

matplotlib is loaded when a picture is made, and no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from autoremat.program import Plan, Program, Schedule, Timeline, simulate
from autoremat.show.text import format_bytes
from autoremat.show.traffic import traffic_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from autoremat.planner.frontiers import Frontier

_MEGA: Final = 1e6


def memory_plot(plan: Plan, path: str | Path | None = None) -> Figure:
    """Draw memory over the step, plain against planned.

    The budget, the peak and where the backward begins are marked.

    The x axis is seconds, as the program has them, or the number of the run where it has none. The picture is saved
    where a path is given; its suffix decides the format, and folders on the way are made.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install 'autoremat[plots]'``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    draw_memory(figure.subplots(), plan)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def frontier_plot(
    front: Frontier, path: str | Path | None = None, *, marks: Mapping[str, Sequence[Plan]] = MappingProxyType({})
) -> Figure:  # fmt: skip
    """Draw overhead against peak.

    With it stand what no plan can go below, the floor and the plain peak.

    ``marks``: plans that are marked, by what they are called there. The picture is saved where a path is given; its
    suffix decides the format, and folders on the way are made.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (``pip install 'autoremat[plots]'``).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw_frontier(figure.subplots(), front, marks=marks)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    return figure


def draw_frontier(
    axes: Axes, front: Frontier, *, marks: Mapping[str, Sequence[Plan]] = MappingProxyType({})
) -> None:  # fmt: skip
    """Draw what ``frontier_plot`` saves into axes of your own."""
    budgets, bounds = [p.budget_bytes / _MEGA for p in front.points], [100 * p.lower_bound for p in front.points]
    peaks, overheads = [p.peak_bytes / _MEGA for p in front.points], [100 * p.overhead for p in front.points]
    # A bound holds for all smaller budgets, a plan for all larger ones: steps, not slopes.
    axes.fill_between(budgets, bounds, step="pre", color="#c0392b", alpha=0.15, linewidth=0, label="no plan is here")
    axes.step(peaks, overheads, where="post", color="#08519c", marker="o", markersize=3, label="autoremat")
    for (name, plans), marker in zip(marks.items(), cycle("sxD^v+*P"), strict=False):
        x, y = [p.peak_bytes / _MEGA for p in plans], [100 * p.overhead for p in plans]
        axes.plot(x, y, marker, markersize=5, alpha=0.8, label=name)
    for name, nbytes in (("floor", front.floor_bytes), ("plain peak", front.plain_peak_bytes)):
        label = f"{name} {format_bytes(nbytes)}"
        axes.axvline(nbytes / _MEGA, color="#8a8f98", linewidth=1, linestyle="--", label=label)
    axes.set_xlabel("peak, MB")
    axes.set_ylabel("extra time, %")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks(*_ticks(max([*overheads, 1.0])))
    axes.set_ylim(bottom=0)
    axes.set_title(front.program.name or "program", loc="left")
    axes.legend(fontsize=8)


def _ticks(most: float) -> tuple[list[float], list[str]]:
    """Percentages for a logarithmic axis from 0, and their names."""
    shown = [0.0, *(t * 10**k for k in range(6) for t in (1.0, 2.0, 5.0) if t * 10**k <= 2 * most)]
    return shown, [f"{t:.0f}" for t in shown]


def draw_memory(axes: Axes, plan: Plan) -> None:
    """Draw what ``memory_plot`` saves into axes of your own."""
    program = plan.program
    plain, planned = simulate(program), simulate(program, plan)
    _draw_line(axes, _moments(program, Schedule.plain(program)), plain, "plain", "#8a8f98")
    moments = _moments(program, plan.schedule)
    _draw_line(axes, moments, planned, f"planned by {plan.solver}", "#08519c")
    _shade_phases(axes, program, plan.schedule, moments)
    budget = f"budget {format_bytes(plan.budget_bytes)}"
    axes.axhline(plan.budget_bytes / _MEGA, color="#c0392b", linewidth=1, linestyle="--", label=budget)
    if planned.peak_run >= 0:
        axes.plot(moments[planned.peak_run], planned.peak_bytes / _MEGA, "v", color="#08519c", label="planned peak")
    axes.set_xlabel("seconds" if program.seconds else "run")
    axes.set_ylabel("MB in memory")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{program.name or 'program'}: {plan.overhead:+.1%} time", loc="left")
    axes.legend(fontsize=8)


def _draw_line(axes: Axes, moments: list[float], timeline: Timeline, name: str, color: str) -> None:
    label = f"{name}: peak {format_bytes(timeline.peak_bytes)}"
    megabytes = [b / _MEGA for b in timeline.resident_bytes]
    axes.step(moments, [*megabytes, *megabytes[-1:]][: len(moments)], where="post", color=color, label=label)


def _moments(program: Program, schedule: Schedule) -> list[float]:
    """List when each run starts, and when the last one ends.

    That is ``runs + 1`` numbers, or none for an empty schedule.
    """
    if not schedule.order:
        return []
    durations = [1.0] * len(schedule.order)
    if program.seconds:
        seen: set[int] = set()
        for p, i in enumerate(schedule.order):
            durations[p] = program.ops[i].again_seconds if i in seen else program.ops[i].seconds
            seen.add(i)
        for p, waited in enumerate(traffic_of(program, schedule).waits[1:]):
            durations[p] += waited
    return list(accumulate(durations, initial=0.0))


def _shade_phases(axes: Axes, program: Program, schedule: Schedule, moments: list[float]) -> None:
    """Forward and backward in two shades, where the schedule has both."""
    first = next((p for p, i in enumerate(schedule.order) if program.ops[i].phase == "backward"), None)
    if first is None:
        return
    axes.axvspan(0, moments[first], color="#2ca25f", alpha=0.06, label="forward")
    axes.axvspan(moments[first], moments[-1], color="#756bb1", alpha=0.06, label="backward")
