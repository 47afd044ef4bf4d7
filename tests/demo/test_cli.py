from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from recollect import cli
from recollect.program import Plan
from tests.program.hand import chain


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "chain.json"
    chain().to_json(path)
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def assert_one_line(result: Result, *parts: str) -> None:
    """The command failed with one line of the form ``Error: ...`` that has all of these parts."""
    assert result.exit_code == 1
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


def test_solve_prints_a_plan_and_writes_it(program: str, tmp_path: Path) -> None:
    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    result = call("solve", program, "--budget", "90", "--json", str(target), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert "Plan for chain" in result.output
    assert Plan.from_json(target).budget_bytes == 90
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_solve_takes_shares_and_solvers(program: str) -> None:
    result = call("solve", program, "--budget", "100%", "--solver", "keep-everything")
    assert result.exit_code == 0, result.output
    assert "100.0% of the plain peak" in result.output


def test_solve_takes_constraints(program: str) -> None:
    result = call("solve", program, "--budget", "100%", "--recompute", "f0")
    assert result.exit_code == 0, result.output
    assert "1 of 5 ops" in result.output
    assert_one_line(call("solve", program, "--budget", "87", "--keep", "f0"), "under the constraints keep=['f0']")
    assert_one_line(call("solve", program, "--budget", "87", "--keep", "g*"), "keep='g*' matches no module")


def test_frontier_prints_a_table_and_saves_a_picture(program: str, tmp_path: Path) -> None:
    picture = tmp_path / "frontier.png"
    result = call("frontier", program, "--points", "3", "--plot", str(picture), "--beside", "segments")
    assert result.exit_code == 0, result.output
    assert "Frontier of chain: floor 87 B, plain peak 95 B" in result.output
    assert "100.0%" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_frontier_names_unknown_solvers(program: str, tmp_path: Path) -> None:
    result = call("frontier", program, "--plot", str(tmp_path / "f.png"), "--beside", "magic")
    assert result.exit_code == 1
    assert "unknown solver 'magic'" in result.output


def test_a_budget_below_the_floor_names_the_floor(program: str) -> None:
    assert_one_line(call("solve", program, "--budget", "11"), "87 bytes", "Give a budget of at least 87 bytes")


@pytest.mark.parametrize("budget", ["much", "-5", "0", "1.5", "nan", "inf"])
def test_a_malformed_budget_says_what_is_accepted(program: str, budget: str) -> None:
    assert_one_line(call("solve", program, f"--budget={budget}"), "accepted are", "10GiB")


def test_an_unknown_solver_names_the_known_ones(program: str) -> None:
    assert_one_line(call("solve", program, "--budget", "0.9", "--solver", "magic"), "magic", "greedy")


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"format": "something else"}))
    assert_one_line(call("solve", str(path), "--budget", "0.5"), "recollect-program")


def test_a_missing_file_names_it() -> None:
    result = call("solve", "nowhere.json", "--budget", "0.5")
    assert result.exit_code == 2
    assert "nowhere.json" in result.output


def test_debug_lets_the_error_through(program: str) -> None:
    result = call("--debug", "solve", program, "--budget", "much")
    assert isinstance(result.exception, ValueError)


def test_an_unexpected_error_points_to_debug(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    # By way of sys.modules, because the attribute recollect.plan is the public function.
    monkeypatch.setattr(sys.modules["recollect.plan"], "solve", fail)
    assert_one_line(call("solve", program, "--budget", "0.5"), "RuntimeError: two lines", "--debug")


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert_one_line(call("demo"), "needs sklearn", "pip install 'recollect[demo]'")


def test_the_demo_needs_four_steps() -> None:
    result = call("demo", "--steps", "3")
    assert result.exit_code == 2
    assert "x>=4" in result.output


def test_version() -> None:
    assert call("--version").output.startswith("recollect, version ")


@pytest.mark.slow
def test_the_quick_demo_runs_and_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    result = call("demo", "--quick", "--steps", "4", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "0 of 6 runs above their budget, 0 of 6 not bit-identical" in result.output
    assert (tmp_path / "demo-memory.png").exists()
