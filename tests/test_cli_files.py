"""The command line and its files: what cannot be written is noticed before any work; errors of the user's code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from autoremat import cli
from autoremat.program import Plan, Program
from tests.command_line import STEPS, assert_one_line, call, program, steps

__all__ = ["program", "steps"]  # fixtures

TARGETS = [
    ("plan", "--json"), ("plan", "--html"), ("plan", "--plot"), ("explain", "--json"), ("frontier", "--json"),
    ("frontier", "--plot"), ("solve", "--json"), ("solve", "--html"), ("solve", "--plot"),
]  # fmt: skip


def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the work began, and its result cannot be written")

    monkeypatch.setattr(cli, "load_step", fail)
    monkeypatch.setattr(Program, "from_json", fail)


def with_target(command: str, option: str, target: str) -> list[str]:
    model = "chain.json" if command == "solve" else "steps.py:mlp"
    return [command, model, *(("--budget", "100%") if command in ("plan", "solve") else ()), option, target]


@pytest.mark.parametrize(("command", "option"), TARGETS)
def test_what_cannot_be_written_is_noticed_before_any_work(
    steps: Path, program: str, command: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_done(monkeypatch)
    (steps / "folder.png").mkdir()
    help_of = f"See `main {command} --help`."
    result = call(*with_target(command, option, "steps.py/new/out.png"))
    assert_one_line(result, "cannot write 'steps.py/new/out.png'", "steps.py is a file, not a folder", help_of, code=2)
    result = call(*with_target(command, option, "folder.png"))
    assert_one_line(result, "cannot write 'folder.png': that is a folder. Name another file.", help_of, code=2)
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    result = call(*with_target(command, option, "out.png"))
    assert_one_line(result, f"cannot write 'out.png': {steps} may not be written", help_of, code=2)


@pytest.mark.parametrize("command", ["plan", "frontier", "solve"])
@pytest.mark.parametrize("name", ["picture.doc", "picture"])
def test_a_picture_that_cannot_be_drawn_is_noticed_before_any_work(
    steps: Path, program: str, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_done(monkeypatch)
    result = call(*with_target(command, "--plot", name))
    assert_one_line(result, f"'{name}' has no ending of a picture", ".png, .svg or .pdf", code=2)


@pytest.mark.parametrize(
    ("command", "option", "module", "extra"),
    [
        ("plan", "--html", "jinja2", "html"), ("solve", "--html", "jinja2", "html"),
        ("plan", "--plot", "matplotlib", "plots"), ("solve", "--plot", "matplotlib", "plots"),
        ("frontier", "--plot", "matplotlib", "plots"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_noticed_before_any_work(
    steps: Path, program: str, command: str, option: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_done(monkeypatch)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    result = call(*with_target(command, option, "out.png"))
    assert_one_line(result, f"this needs {module}; run: pip install 'autoremat[{extra}]'")


def test_a_file_that_cannot_be_used_after_all_is_one_line(
    steps: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "plan.json")

    monkeypatch.setattr(Plan, "to_json", full)
    result = call("solve", program, "--budget", "100%", "--json", "plan.json")
    assert_one_line(result, "cannot use 'plan.json' (No space left on device); name another file")


def test_a_file_that_cannot_be_written_to_its_end_stays_as_it_was(
    steps: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is named: what the system raises in the middle of a file does not say of which."""
    write = Path.write_text

    def half(path: Path, text: str, **options: Any) -> int:
        write(path, text[: len(text) // 2], **options)
        raise OSError(27, "File too large")

    (steps / "plan.json").write_text("of yesterday")
    before = sorted(steps.iterdir())
    monkeypatch.setattr(Path, "write_text", half)
    result = call("solve", program, "--budget", "100%", "--json", "plan.json")
    assert_one_line(result, "cannot use 'plan.json' (File too large); name another file")
    assert (steps / "plan.json").read_text() == "of yesterday"
    assert sorted(steps.iterdir()) == before


def test_a_warning_of_a_check_is_one_line(steps: Path) -> None:
    result = call("check", "steps.py:warns", "--budget", "1MB")
    assert result.exit_code == 0, result.output
    assert [line for line in result.stderr.splitlines() if "rows" in line] == ["Warning: odd rows"]


def test_a_file_alone_stands_for_its_step(steps: Path) -> None:
    (steps / "alone.py").write_text(STEPS.replace("def mlp", "def step"))
    result = call("explain", "alone.py")
    assert result.exit_code == 0, result.output
    assert "Peak of alone, trained plainly" in result.output


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("plan steps.py:raises --budget 50%", 1), ("explain steps.py:mpl", 1), ("frontier steps.py:tensor", 1),
        ("check steps.py:raises --budget 50%", 1), ("solve broken.json --budget 4", 1),
    ],
)  # fmt: skip
def test_debug_shows_the_error_of_every_command(steps: Path, line: str, code: int) -> None:
    (steps / "broken.json").write_text("{")
    result = call("--debug", *line.split())
    assert result.exit_code == code
    assert not isinstance(result.exception, SystemExit)
    assert "Error:" not in result.output


def test_debug_shows_what_the_function_of_the_user_raised(steps: Path) -> None:
    result = call("--debug", "plan", "steps.py:raises", "--budget", "50%")
    assert isinstance(result.exception, ValueError)
    assert isinstance(result.exception.__cause__, RuntimeError)


def test_a_file_that_changes_its_place_is_read_anew(steps: Path) -> None:
    (steps / "other").mkdir()
    (steps / "other" / "steps.py").write_text(STEPS.replace("def mlp", "def other"))
    assert call("explain", "steps.py:mlp").exit_code == 0
    assert "Peak of other" in call("explain", "other/steps.py:other").output
