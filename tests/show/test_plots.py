from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from autoremat.program import Op, Program, Schedule, simulate
from autoremat.show.plots import draw_memory, memory_plot
from tests.program.hand import away, chain_plan


def drawn(plan: object) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    axes = Figure().subplots()
    draw_memory(axes, plan)  # type: ignore[arg-type]
    lines = {str(line.get_label()).split(":")[0]: line for line in axes.get_lines()}
    return (
        {k: [float(x) for x in line.get_xdata()] for k, line in lines.items()},
        {k: [float(y) for y in line.get_ydata()] for k, line in lines.items()},
    )


def test_the_lines_are_the_simulated_bytes() -> None:
    plan = chain_plan()
    x, y = drawn(plan)
    planned = [b / 1e6 for b in simulate(plan.program, plan).resident_bytes]
    assert y["planned by by hand"] == [*planned, planned[-1]]
    assert x["planned by by hand"] == [0, 1, 3, 6, 7, 8, 9]
    assert x["plain"] == [0, 1, 3, 6, 7, 8]
    assert y["budget 90 B"] == [90e-6, 90e-6]
    assert (x["planned peak"], y["planned peak"]) == ([8], [87e-6])


def test_the_axis_has_the_waits_for_copies() -> None:
    program, schedule = away()
    plan = replace(chain_plan(), program=program, schedule=schedule)
    (axes,) = memory_plot(plan).axes
    planned = axes.get_lines()[1]
    assert planned.get_xdata()[-1] == simulate(program, schedule).seconds


def test_without_seconds_the_axis_counts_runs() -> None:
    plan = chain_plan()
    ops = tuple(replace(op, seconds=0.0) for op in plan.program.ops)
    x, _ = drawn(replace(plan, program=replace(plan.program, ops=ops)))
    assert x["planned by by hand"] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("ops", [(), (Op("only forward", (), ()),)])
def test_programs_without_backward_can_be_drawn(ops: tuple[Op, ...], tmp_path: Path) -> None:
    program = Program("", (), ops)
    plan = replace(chain_plan(), program=program, schedule=Schedule.plain(program))
    memory_plot(plan, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_the_picture_is_saved_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.png"
    assert chain_plan().plot(path).axes
    assert imread(path).std() > 0
