"""The command line refuses in one line: models that cannot be used, options that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoremat.program import Program
from tests.command_line import assert_one_line, call, program, steps
from tests.program.hand import chain_plan

__all__ = ["program", "steps"]  # fixtures


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
        ("solve plan.json --budget 4 --effort 0", 2, "0.0 is not in the range x>0"),
        ("plan steps.py:mlp --budget 50% --effort much", 2, "'much' is not a valid float"),
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
