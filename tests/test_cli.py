from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from autoremat import cli
from autoremat.program import InfeasibleBudget, Plan, Program
from tests.program.hand import chain, chain_plan


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "chain.json"
    chain().to_json(path)
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def assert_one_line(result: Result, *parts: str, code: int = 1) -> None:
    """The command failed with one line of the form ``Error: ...`` that has all of these parts."""
    assert result.exit_code == code, result.output
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


# --- Models by name ---------------------------------------------------------------------------------------------------

MODELS = str(Path(__file__).parent.parent / "examples" / "models.py")
STEPS = """
import sys
import warnings

import torch
from torch import nn

def mlp():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    return lambda x, scale: (model(x) * scale).sum(), (torch.randn(64, 16),), {"scale": 2.0}

def meta():
    with torch.device("meta"):
        return nn.Linear(1 << 20, 1 << 20), (torch.empty(64, 1 << 20),)

def raises():
    raise RuntimeError("no\\nweights")

def tensor():
    return torch.ones(3)

def no_args():
    return nn.Linear(2, 2), torch.ones(3, 2)

def no_kwargs():
    return nn.Linear(2, 2), (torch.ones(3, 2),), 4

def stops():
    raise SystemExit(0)

def stops_inside():
    return (lambda x: sys.exit(0)), (torch.ones(3, 2),)

def fails_inside():
    def step(x):
        raise ValueError("odd number of rows")
    return step, (torch.ones(3, 2),)

def warns():
    layer = nn.Linear(2, 2)
    def step(x):
        warnings.warn("odd\\nrows")
        return layer(x).square().sum()
    return step, (torch.ones(3, 2),)

def looks():
    return (lambda x: (x * x.sum().item()).sum()), (torch.ones(3, 2, device="meta", requires_grad=True),)

def nothing():
    return nn.Linear(2, 2).requires_grad_(False), (torch.ones(3, 2),)

number = 4
"""


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, which is the current one, with models of all sorts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "broken.py").write_text("import steps\nnot_a_name\n")
    (tmp_path / "needs.py").write_text("import not_installed\n")
    yield tmp_path
    for name in ("steps", "broken", "needs"):
        sys.modules.pop(name, None)


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


@pytest.mark.parametrize("name", ["gpt", "resnet"])
def test_the_examples_are_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    result = call("plan", f"{MODELS}:{name}", "--budget", "50%", "--time-limit", "3", "--json", "-")
    assert result.exit_code == 0, result.output
    plan = Plan.from_json(result.output)
    assert plan.peak_bytes <= plan.budget_bytes == plan.plain_peak_bytes // 2


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


@pytest.mark.parametrize("command", ["plan", "explain", "frontier", "check"])
@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("steps", 2, "'steps' names no function; write package.module:function or path/to/file.py:function"),
        ("steps.py", 2, "steps.py has no function 'step'; it has: mlp, meta, raises"),
        ("gone.py", 2, "there is no file gone.py; write package.module:function or path/to/file.py:function"),
        ("", 2, "'' names no function"),
        ("steps.py:", 2, "names no function"),
        ("gone.py:mlp", 2, "there is no file gone.py; write package.module:function or path/to/file.py:function"),
        ("gone/models:mlp", 2, "there is no file gone/models"),
        ("gone.module:mlp", 2, "there is no module 'gone' in"),
        ("steps.py:mpl", 2, "steps.py has no function 'mpl'; it has: mlp, meta, raises"),
        ("steps.py:number", 2, "steps.py has no function 'number'"),
        ("broken.py:mlp", 1, "broken.py cannot be imported: NameError: name 'not_a_name' is not defined"),
        (
            "needs:mlp",
            1,
            "needs cannot be imported: ModuleNotFoundError: No module named 'not_installed'",
        ),
        ("steps.py:raises", 1, "steps.py:raises raised RuntimeError: no weights; call it in Python to look into it"),
        ("steps.py:tensor", 1, "steps.py:tensor returned Tensor; it must return (fn, args) or (fn, args, kwargs)"),
        ("steps.py:no_args", 1, "args must be a tuple such as (x, y), got Tensor; one argument is (x,)"),
        ("steps.py:no_kwargs", 1, "kwargs must be a dict, got int"),
        ("steps.py:stops", 1, "the code of the step ended the program (exit code 0); take that out"),
        ("steps.py:stops_inside", 1, "the code of the step ended the program (exit code 0); take that out"),
        ("steps.py:fails_inside", 1, "Error: ValueError: odd number of rows (autoremat --debug shows where)"),
        ("steps.py:looks", 1, "give it real ones"),
        ("steps.py:nothing", 1, "check that some parameter has requires_grad=True"),
    ],
)
def test_models_that_cannot_be_used(steps: Path, command: str, model: str, code: int, message: str) -> None:
    budget = ("--budget", "50%") if command in ("plan", "check") else ()
    assert_one_line(call(command, model, *budget), message, code=code)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("plan", 2, "Missing argument 'MODEL'. See `main plan --help`."),
        ("plan steps.py:mlp", 2, "Missing option '--budget'. See `main plan --help`."),
        ("plan steps.py:mlp --budget much", 2, "accepted are bytes"),
        ("plan steps.py:mlp --budget 4", 3, "Give a budget of at least"),
        ("plan steps.py:mlp --budget 50% --solver magic", 2, "'magic' is not one of 'auto'"),
        ("plan steps.py:mlp --budget 50% --time-limit 0", 2, "0.0 is not in the range x>0"),
        ("plan steps.py:mlp --budget 50% --optimizer 50%", 2, "'50%' is no number of bytes; accepted are 3000000"),
        ("plan steps.py:mlp --budget 50% --optimizer adam", 2, "'adam' is no number of bytes; accepted are 3000000"),
        ("plan steps.py:mlp --budget 50% --optimizer -5", 2, "is no number of bytes"),
        ("plan steps.py:mlp --budget 50% --time-limit soon", 2, "'soon' is not a valid float"),
        ("plan steps.py:mlp --budget 50% --timing guess", 2, "'guess' is not one of 'auto', 'measure', 'estimate'"),
        ("plan steps.py:meta --budget 50% --device nowhere", 1, "device 'nowhere' is not available to torch"),
        ("plan steps.py:mlp --budget 50% --keep nothing.*", 1, "matches no module"),
        ("plan step.json --budget 50%", 2, "to plan the program in it: autoremat solve step.json"),
        ("plan steps.py:mlp --budget 50% --time-limit nan", 2, "'nan' is no number of seconds"),
        ("plan steps.py:mlp --budget 50% --html -", 2, "only --json can go to the terminal with -"),
        ("plan steps.py:mlp --budget 50% --json /proc/plan.json", 2, "/proc may not be written"),
        ("plan steps.py:mlp --budget 50% --html one --json ./one", 2, "--json, --plot and --html name one file twice"),
        ("solve plan.json --budget 50% --html one --json one", 2, "--json, --plot and --html name one file twice"),
        ("frontier steps.py:mlp --plot one.png --json one.png", 2, "--json, --plot and --html name one file twice"),
        ("explain gone.json", 2, "there is no file gone.json"),
        ("explain other.json", 2, "other.json is neither a program nor a plan: its format is 'autoremat-explanation'"),
        ("explain binary.json", 1, "file 'binary.json' is not text in UTF-8"),
        ("frontier empty.json", 1, "program 'empty' has no operators"),
        ("explain steps.py:mlp --keep 0.*", 2, "give a --budget with them"),
        ("explain steps.py:mlp --budget 4", 3, "Give a budget of at least"),
        ("explain plan.json --budget 4", 2, "plan.json is a plan, which has its budget; leave --budget out"),
        ("explain plan.json --optimizer 4", 2, "--timing and --accumulate are for models"),
        ("explain plan.json --accumulate", 2, "--timing and --accumulate are for models"),
        ("explain steps.py:mlp --budget much", 2, "accepted are bytes"),
        ("explain steps.py:mlp --time-limit -1", 2, "-1.0 is not in the range x>0"),
        ("explain steps.py", 2, "steps.py has no function 'step'"),
        ("explain broken.json", 1, "file 'broken.json' is not valid JSON"),
        ("frontier", 2, "Missing argument 'MODEL'. See `main frontier --help`."),
        ("frontier gone.json", 2, "there is no file gone.json"),
        ("frontier broken.json", 1, "file 'broken.json' is not valid JSON"),
        ("frontier steps.py:mlp --points 1", 2, "1 is not in the range x>=2"),
        ("frontier steps.py:mlp --time-limit 0", 2, "0.0 is not in the range x>0"),
        ("frontier steps.py:mlp --keep nothing.*", 1, "matches no module"),
        ("frontier steps.py:mlp --device nowhere", 1, "device 'nowhere' is not available to torch"),
        ("check", 2, "Missing argument 'MODEL'. See `main check --help`."),
        ("check steps.py:mlp", 2, "Missing option '--budget'. See `main check --help`."),
        ("check steps.py:mlp --budget much", 2, "accepted are bytes"),
        ("check steps.py:mlp --budget 4", 3, "Give a budget of at least"),
        ("check steps.py:mlp --budget 50% --time-limit 0", 2, "0.0 is not in the range x>0"),
        ("check steps.py:mlp --budget 50% --keep nothing.*", 1, "matches no module"),
        ("check steps.py:meta --budget 50%", 1, "meta"),
        ("check plan.json --budget 50%", 2, "'plan.json' names no function"),
        ("solve", 2, "Missing argument 'FILE'. See `main solve --help`."),
        ("solve plan.json", 2, "Missing option '--budget'. See `main solve --help`."),
        ("solve gone.json --budget 4", 2, "File 'gone.json' does not exist. See `main solve --help`."),
        ("solve broken.json --budget 4", 1, "file 'broken.json' is not valid JSON"),
        ("solve plan.json --budget 4 --solver magic", 2, "'magic' is not one of 'auto'"),
        ("solve plan.json --budget 4 --time-limit 0", 2, "0.0 is not in the range x>0"),
        ("demo --steps many", 2, "'many' is not a valid integer"),
        ("demo --magic", 2, "No such option"),
        ("demo --out steps.py/out", 2, "steps.py is a file, not a folder. Name another folder."),
        ("solve steps.py --budget 4", 1, "file 'steps.py' is not valid JSON"),
        ("solve plan.json --budget 4", 1, "Plan.from_json and `autoremat explain` read plans"),
        ("solve binary.json --budget 4", 1, "file 'binary.json' is not text in UTF-8"),
        ("solve huge.json --budget 4", 1, "value 0 (a): field 'bytes' has 401 digits"),
        ("magic", 2, "No such command 'magic'. See `main --help`."),
        ("--magic", 2, "No such option"),
        ("plan --magic", 2, "No such option"),
    ],
)
def test_wrong_input(steps: Path, line: str, code: int, message: str) -> None:
    chain_plan().to_json(steps / "plan.json")
    (steps / "broken.json").write_text('{"format": ')
    (steps / "other.json").write_text('{"format": "autoremat-explanation"}')
    (steps / "binary.json").write_bytes(b"\xf1\x00")
    empty = Program("empty", (), ())
    empty.to_json(steps / "empty.json")
    huge = {**json.loads(empty.to_json()), "values": [{"id": "a", "bytes": 10**400}]}
    (steps / "huge.json").write_text(json.dumps(huge))
    assert_one_line(call(*line.split()), message, code=code)


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
