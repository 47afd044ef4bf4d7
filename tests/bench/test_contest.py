"""The benchmark's folder, and a contest on it: what is better is written down, what is wrong is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoremat.bench.catalog import SHARES, Catalog, NoCatalog, order_of, stretches_of
from autoremat.bench.contest import Effort, Row, rows_of
from autoremat.bench.lines import line_of, summary_of
from autoremat.cli import REFUSED, USAGE, main
from autoremat.planner import solve
from autoremat.program import Program, Schedule
from tests.planner.layers import stack

LITTLE = Effort(10.0, 0.02)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.at(tmp_path).with_program("stack", "chain", stack(8))


def test_a_program_has_five_budgets_between_floor_and_peak(catalog: Catalog) -> None:
    (task,) = Catalog.at(catalog.folder).tasks
    assert len(task.budgets) == len(SHARES) == 5
    assert all(0 < best.budget_bytes < task.plain_peak_bytes for best in task.budgets)
    assert Program.from_json(catalog.program_data("stack")) == stack(8)


def test_what_is_better_is_written_down_with_its_schedule(catalog: Catalog) -> None:
    program, best = stack(8), catalog.tasks[0].budgets[2]
    plan = solve(program, best.budget_bytes, effort=0.02)
    known = catalog.with_plan("stack", 2, plan, "somebody")
    again = Catalog.at(catalog.folder)
    assert again == known
    assert again.tasks[0].budgets[2].by == "somebody"
    assert again.schedules("stack")[best.budget_bytes] == plan.schedule
    worse = replace(plan, overhead=plan.overhead + 0.1, lower_bound=0.0)
    assert again.with_plan("stack", 2, worse, "nobody") == again


def test_a_contest_has_a_row_for_every_budget(catalog: Catalog) -> None:
    rows = list(rows_of(catalog, "every-block", LITTLE))
    assert len(rows) == 5
    assert all(row.faults == () for row in rows)
    assert "5 budgets" in summary_of(rows)


def test_a_solver_of_ones_own_is_judged(catalog: Catalog) -> None:
    def plain(program: Program, budget_bytes: int, *, deadline: float) -> Schedule:
        return Schedule.plain(program)

    assert [row.verdict for row in rows_of(catalog, plain, LITTLE)] == ["as known"] * 5


def with_a_bound_too_high(catalog: Catalog) -> Catalog:
    plan = solve(stack(8), catalog.tasks[0].budgets[4].budget_bytes, solver="rotor")
    return catalog.with_plan("stack", 4, replace(plan, lower_bound=plan.overhead + 9.0), "proud")


def test_a_broken_bound_is_refused(catalog: Catalog) -> None:
    row = list(rows_of(with_a_bound_too_high(catalog), "rotor", LITTLE))[4]
    assert "less than the bound" in row.faults[0]
    assert row.verdict == "REFUSED"
    assert "less than the bound" in line_of(row)


def test_verdicts(catalog: Catalog) -> None:
    plan = solve(stack(8), catalog.tasks[0].budgets[1].budget_bytes, effort=0.02)
    better = catalog.with_plan("stack", 1, plan, "us").tasks[0]
    row = Row(better, 1, plan, 1.0, ())
    assert row.verdict == "as known"
    assert replace(row, plan=None).verdict == "none"
    assert replace(row, plan=replace(plan, overhead=plan.overhead - 0.01)).verdict == "BETTER"
    assert replace(row, plan=replace(plan, overhead=plan.overhead + 0.01)).verdict == "worse"


def test_the_command_prints_a_row_for_each_and_updates(catalog: Catalog) -> None:
    arguments = ["bench", "rotor", "--programs", str(catalog.folder), "--update", "--by", "us"]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 0, found.output
    assert found.output.count("stack") == 5
    assert any(best.by == "us" for best in Catalog.at(catalog.folder).tasks[0].budgets)


def test_the_command_says_that_something_was_refused(catalog: Catalog) -> None:
    folder = with_a_bound_too_high(catalog).folder
    found = CliRunner().invoke(main, ["bench", "rotor", "--programs", str(folder), "--effort", "0.02"])
    assert found.exit_code == REFUSED


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody"], "names no function"),
        (["auto", "--update"], "--update needs --by"),
    ],
)
def test_wrong_use_is_said_in_one_line(arguments: list[str], says: str) -> None:
    found = CliRunner().invoke(main, ["bench", *arguments])
    assert found.exit_code == USAGE
    assert says in found.output


def test_without_the_folder_it_says_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(NoCatalog, match="--programs"):
        Catalog.at(tmp_path / "nowhere")


def test_stretches_and_orders_are_the_same() -> None:
    order = (0, 1, 2, 1, 2, 5, 4, 3, 4)
    assert order_of(stretches_of(order)) == order
