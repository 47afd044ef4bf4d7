"""The command line: what it prints, which models it takes, and what it answers to what it cannot take."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from autoremat import cli
from autoremat.program import InfeasibleBudget, Plan
from tests.command_line import MODELS, assert_one_line, call, program, steps
from tests.program.hand import chain, chain_plan

__all__ = ["program", "steps"]  # fixtures


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
    assert_one_line(
        call("solve", program, "--budget", "87", "--keep", "f0"), "under the constraints keep=['f0']", code=3
    )
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
    assert_one_line(result, "'magic' is not one of", "'every-block'", code=2)


def test_a_budget_below_the_floor_names_the_floor(program: str) -> None:
    assert_one_line(call("solve", program, "--budget", "11"), "87 bytes", "Give a budget of at least 87 bytes", code=3)


@pytest.mark.parametrize("budget", ["much", "-5", "0", "1.5", "nan", "inf"])
def test_a_malformed_budget_says_what_is_accepted(program: str, budget: str) -> None:
    assert_one_line(call("solve", program, f"--budget={budget}"), "accepted are", "10GiB", "solve --help", code=2)


def test_an_unknown_solver_names_the_known_ones(program: str) -> None:
    assert_one_line(call("solve", program, "--budget", "0.9", "--solver", "magic"), "magic", "greedy", code=2)


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({"format": "something else"}))
    assert_one_line(call("solve", str(path), "--budget", "0.5"), "autoremat-program")


def test_a_missing_file_names_it() -> None:
    assert_one_line(call("solve", "nowhere.json", "--budget", "0.5"), "nowhere.json", "solve --help", code=2)


def test_debug_lets_the_error_through(program: str) -> None:
    result = call("--debug", "solve", program, "--budget", "11")
    assert isinstance(result.exception, InfeasibleBudget)


def test_an_unexpected_error_points_to_debug(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("two\nlines")

    # By way of sys.modules, because the attribute autoremat.plan is the public function.
    monkeypatch.setattr(sys.modules["autoremat.planner"], "solve", fail)
    assert_one_line(call("solve", program, "--budget", "0.5"), "RuntimeError: two lines", "--debug")


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    assert_one_line(call("demo"), "needs sklearn", "pip install 'autoremat[demo]'")


def test_the_demo_needs_four_steps() -> None:
    assert_one_line(call("demo", "--steps", "3"), "x>=4", "demo --help", code=2)


def test_version() -> None:
    assert call("--version").output.startswith("autoremat, version ")


@pytest.mark.slow
def test_the_quick_demo_runs_and_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    result = call("demo", "--quick", "--steps", "4", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "0 of 6 runs above their budget, 0 of 6 not bit-identical" in result.output
    assert (tmp_path / "demo-memory.png").exists()


@pytest.mark.parametrize("model", ["steps.py:mlp", "steps:mlp", "./steps.py:mlp"])
def test_plan_takes_files_and_modules(steps: Path, model: str) -> None:
    result = call("plan", model, "--budget", "100%", "--json", "new/plan.json", "--plot", "plan.png")
    assert result.exit_code == 0, result.output
    assert "Plan for mlp" in result.output
    assert "Plan written to new/plan.json" in result.output
    assert Plan.from_json(steps / "new" / "plan.json").program.name == "mlp"
    assert (steps / "plan.png").exists()


def test_nothing_of_a_meta_model_is_allocated(steps: Path) -> None:
    result = call("explain", "steps.py:meta", "--optimizer", "8TB")
    assert result.exit_code == 0, result.output
    assert "4.40 TB" in result.output  # of parameters
    assert "8.00 TB" in result.output


@pytest.mark.one_in(2, guard=True)
@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_the_examples_are_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    result = call("plan", f"{MODELS}:{name}", "--budget", "50%", "--time-limit", "3", "--json", "-")
    assert result.exit_code == 0, result.output
    plan = Plan.from_json(result.output)
    assert plan.peak_bytes <= plan.budget_bytes == plan.plain_peak_bytes // 2


def test_frontier_and_plan_take_a_tier(steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoremat.engines.torch.world.tier._SAMPLE_BYTES", 4096)
    tier = ("--offload", f"disk:{tmp_path}", "--offload-budget", "1GiB", "--time-limit", "2")
    result = call("frontier", "steps.py:mlp", "--points", "2", *tier)
    assert "to the tier" in result.output
    result = call("plan", "steps.py:mlp", "--budget", "1.0", *tier, "--json", "-")
    link = Plan.from_json(result.output).program.link
    assert link is not None
    assert (link.name, link.tier_bytes) == (f"disk:{tmp_path}", 1 << 30)


def test_explain_takes_models_programs_and_plans(steps: Path, program: str) -> None:
    assert "Peak of mlp, trained plainly" in call("explain", "steps.py:mlp").output
    assert "Peak of mlp, planned by" in call("explain", "steps.py:mlp", "--budget", "95%").output
    assert "Peak of chain, trained plainly: 95 B" in call("explain", program).output
    assert "Peak of chain, planned by" in call("explain", program, "--budget", "90").output
    chain_plan().to_json(steps / "plan.json")
    assert "Peak of chain, planned by by hand for 90 B: 87 B" in call("explain", "plan.json").output
    data = json.loads(call("explain", program, "--json", "-").output)
    assert (data["format"], sum(data["categories"].values())) == ("autoremat-explanation", 95)


def test_frontier_takes_models_and_writes_json(steps: Path) -> None:
    result = call("frontier", "steps.py:mlp", "--points", "3", "--json", "frontier.json")
    assert result.exit_code == 0, result.output
    assert "Frontier of mlp" in result.output
    data = json.loads((steps / "frontier.json").read_text())
    assert data["format"] == "autoremat-frontier"
    assert [p["budget_bytes"] for p in data["points"]][-1] == data["plain_peak_bytes"]


@pytest.mark.parametrize("command", ["plan", "explain", "frontier", "check", "solve", "demo"])
def test_help_has_examples(command: str) -> None:
    text = call(command, "--help").output
    assert "Examples:\n" in text
    assert f"  autoremat {command} " in text


def test_the_help_names_the_exit_codes() -> None:
    assert "3 no plan fits into the budget" in " ".join(call("--help").output.split())


def test_the_shell_completes_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"COMP_WORDS": "autoremat solve --solver che", "COMP_CWORD": "3"}
    result = CliRunner().invoke(
        cli.main, [], prog_name="autoremat", env=words | {"_AUTOREMAT_COMPLETE": "bash_complete"}
    )
    assert result.output.split() == ["plain,chen", "plain,chen-recursive"]


def test_a_file_is_explained_for_what_the_device_has(tmp_path: Path) -> None:
    path = tmp_path / "chain.json"
    chain().to_json(path)
    assert call("explain", str(path), "--budget", "auto").exit_code == 0
