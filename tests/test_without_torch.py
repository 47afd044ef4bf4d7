"""Without an engine: programs are read, planned, judged, explained and drawn; what needs one says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.planner.chains import gpt

WITHOUT = "import sys; sys.modules['torch'] = None; "


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which there is no torch."""
    command = [sys.executable, "-W", "error", "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def step(tmp_path: Path) -> str:
    """The file of a step."""
    path = tmp_path / "step.json"
    gpt(2).to_json(path)
    return str(path)


@pytest.mark.slow
@pytest.mark.guard
def test_a_file_is_planned_judged_and_explained(step: str) -> None:
    code = (
        "import autoremat; from autoremat.show.explanation import explanation_of; "
        "program = autoremat.Program.from_json(sys.argv[1]); plan = autoremat.solve(program, '60%'); "
        "assert autoremat.verify(program, plan) == (); print(plan); print(explanation_of(program, plan))"
    )
    found = run(code, step)
    assert (found.returncode, found.stderr) == (0, "")
    assert "budget" in found.stdout


@pytest.mark.parametrize("name", ["checkpoint", "plan", "explain", "frontier", "max_batch", "check", "stats"])
def test_what_needs_an_engine_says_what_to_install(name: str) -> None:
    found = run(f"import autoremat; autoremat.{name}")
    assert (
        f"autoremat.{name} needs an engine, and torch is not installed; run: pip install 'autoremat[torch]'"
        in found.stderr
    )


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize(
    "command",
    [
        ["solve", "STEP", "--budget", "60%"],
        ["explain", "STEP", "--budget", "60%"],
        ["frontier", "STEP", "--points", "3"],
    ],
)
def test_the_command_line_works_on_files(command: list[str], step: str) -> None:
    code = "from autoremat.cli import main; main(sys.argv[1:])"
    found = run(code, *[step if word == "STEP" else word for word in command])
    assert found.returncode == 0, found.stderr


def test_the_command_line_says_what_a_model_needs() -> None:
    found = run("from autoremat.cli import main; main(sys.argv[1:])", "plan", "model.py", "--budget", "60%")
    assert found.returncode != 0
    assert "pip install 'autoremat[torch]'" in found.stderr
