"""The JSON files that are refused, and the words in which that is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoremat.program import InvalidProgram, Plan, Program
from autoremat.program.json_format import plan_to_data, program_to_data
from tests.program.hand import chain, chain_plan

Change = Callable[[dict[str, Any]], object]


def put(*path: str | int, value: Any) -> Change:
    """Set what stands at the path."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def drop(*path: str | int) -> Change:
    """Remove what stands at the path."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


REFUSED: dict[str, tuple[Change, str]] = {
    "no format": (drop("format"), "file: field 'format' is missing"),
    "format": (put("format", value="onnx"), "file: field 'format' must be 'autoremat-program', got 'onnx'"),
    "plan": (
        put("format", value="autoremat-plan"),
        "; Plan.from_json and `autoremat explain` read plans",
    ),
    "no version": (drop("version"), "file: field 'version' is missing"),
    "version": (put("version", value=3), "field 'version' is 3, but this autoremat reads versions 1 and 2 of"),
    "version text": (put("version", value="1"), "file: field 'version' must be an integer, got '1'"),
    "no name": (drop("name"), "program: field 'name' is missing"),
    "timing": (put("timing", value=3), "program: field 'timing' must be a string, got 3"),
    "no values": (drop("values"), "program: field 'values' is missing"),
    "values": (put("values", value={}), "program: field 'values' must be a list, got {}"),
    "no ops": (drop("ops"), "program: field 'ops' is missing"),
    "value": (put("values", 1, value="a"), "value 1 must be an object, got 'a'"),
    "no id": (drop("values", 1, "id"), "value 1: field 'id' is missing"),
    "id": (put("values", 1, "id", value=1), "value 1: field 'id' must be a string, got 1"),
    "id twice": (lambda data: data["values"].append({"id": "a", "bytes": 1}), "value id 'a' is used twice"),
    "no bytes": (drop("values", 1, "bytes"), "value 1 (a): field 'bytes' is missing"),
    "bytes": (put("values", 1, "bytes", value="20"), "value 1 (a): field 'bytes' must be an integer, got '20'"),
    "half a byte": (put("values", 1, "bytes", value=0.5), "value 1 (a): field 'bytes' must be an integer, got 0.5"),
    "true bytes": (put("values", 1, "bytes", value=True), "value 1 (a): field 'bytes' must be an integer, got True"),
    "negative": (put("values", 1, "bytes", value=-1), "value 'a': bytes must not be negative, got -1"),
    "fixed": (put("values", 0, "fixed", value=1), "value 0 (x): field 'fixed' must be true or false, got 1"),
    "held": (put("values", 1, "held", value="f0"), "field 'held' must be the index of an op or 'end', got 'f0'"),
    "held below": (put("values", 1, "held", value=-1), "field 'held' must be the index of an op or 'end', got -1"),
    "held beyond": (put("values", 1, "held", value=5), "value 'a': held names op 5, but the program has 5 ops"),
    "label": (put("values", 1, "label", value=[]), "value 1 (a): field 'label' must be a string, got []"),
    "dtype": (put("values", 1, "dtype", value=4), "value 1 (a): field 'dtype' must be a string, got 4"),
    "shape": (put("values", 1, "shape", value="2, 1"), "value 1 (a): field 'shape' must be a list, got '2, 1'"),
    "sizes": (put("values", 1, "shape", value=[2, True]), "field 'shape' must be a list of sizes, got [2, True]"),
    "no size": (put("values", 1, "shape", value=[-1]), "value 1 (a): field 'shape' must be a list of sizes, got [-1]"),
    "its module": (put("values", 1, "module", value=None), "value 1 (a): field 'module' must be a string, got None"),
    "op": (put("ops", 1, value=None), "op 1 must be an object, got None"),
    "no op name": (drop("ops", 1, "name"), "op 1: field 'name' is missing"),
    "no reads": (drop("ops", 1, "reads"), "op 1 (f1): field 'reads' is missing"),
    "no writes": (drop("ops", 1, "writes"), "op 1 (f1): field 'writes' is missing"),
    "reads": (put("ops", 1, "reads", value="a"), "op 1 (f1): field 'reads' must be a list, got 'a'"),
    "reads what": (put("ops", 1, "reads", 0, value="q"), "op 1 (f1): field 'reads' names value 'q', which is not amo"),
    "reads index": (put("ops", 1, "reads", 0, value=1), "op 1 (f1): field 'reads' names value 1, which is not among"),
    "reads list": (put("ops", 1, "reads", 0, value=["a"]), "op 1 (f1): field 'reads' names value ['a'], which is not"),
    "writes what": (put("ops", 1, "writes", 0, value="q"), "op 1 (f1): field 'writes' names value 'q', which is not"),
    "seconds": (put("ops", 1, "seconds", value="2"), "op 1 (f1): field 'seconds' must be a finite number, got '2'"),
    "true seconds": (put("ops", 1, "seconds", value=True), "field 'seconds' must be a finite number, got True"),
    "endless": (put("ops", 1, "seconds", value=float("inf")), "field 'seconds' must be a finite number, got inf"),
    "nan": (put("ops", 1, "seconds", value=float("nan")), "field 'seconds' must be a finite number, got nan"),
    "huge": (put("ops", 1, "seconds", value=10**400), "field 'seconds' must be a finite number, got 1000"),
    "negative seconds": (put("ops", 1, "seconds", value=-2), "op 1 (f1): seconds must be finite and not negative"),
    "scratch": (put("ops", 1, "scratch_bytes", value=1.0), "op 1 (f1): field 'scratch_bytes' must be an integer, got"),
    "phase": (put("ops", 1, "phase", value=1), "op 1 (f1): field 'phase' must be a string, got 1"),
    "once": (put("ops", 1, "once", value=False), "field 'once' must be a string, got False"),
    "once unknown": (put("ops", 1, "once", value="no"), "must be 'given', with the reason in 'note', or one of"),
    "kind": (put("ops", 1, "kind", value="unpack"), "field 'kind' must be one of op, ask, step, got 'unpack'"),
    "in_place": (put("ops", 1, "in_place", value=["b"]), "op 1 (f1): field 'in_place' must be an object, got ['b']"),
    "in_place new": (put("ops", 1, "in_place", value={"q": "a"}), "op 1 (f1): field 'in_place' names value 'q'"),
    "in_place old": (put("ops", 1, "in_place", value={"b": 1}), "op 1 (f1): field 'in_place' names value 1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_programs(change: Change, message: str) -> None:
    data = program_to_data(chain())
    change(data)
    with pytest.raises(InvalidProgram, match=re.escape(message)):
        Program.from_json(data)


REFUSED_PLANS: dict[str, tuple[Change, str]] = {
    "program": (
        put("format", value="autoremat-program"),
        "; Program.from_json and `autoremat solve` read programs",
    ),
    "version": (put("version", value=0), "field 'version' is 0, but this autoremat reads versions 1 and 2 of"),
    "no program": (drop("program"), "plan: field 'program' is missing"),
    "its program": (drop("program", "ops", 1, "reads"), "op 1 (f1): field 'reads' is missing"),
    "no budget": (drop("budget_bytes"), "plan: field 'budget_bytes' is missing"),
    "peak": (put("peak_bytes", value=1.5), "plan: field 'peak_bytes' must be an integer, got 1.5"),
    "no plain peak": (drop("plain_peak_bytes"), "plan: field 'plain_peak_bytes' is missing"),
    "no floor": (drop("floor_bytes"), "plan: field 'floor_bytes' is missing"),
    "floor bound": (put("floor_lower_bound_bytes", value="1"), "field 'floor_lower_bound_bytes' must be an integer"),
    "overhead": (put("overhead", value="4 %"), "plan: field 'overhead' must be a finite number, got '4 %'"),
    "no bound": (drop("lower_bound"), "plan: field 'lower_bound' is missing"),
    "solver": (put("solver", value=None), "plan: field 'solver' must be a string, got None"),
    "candidates": (put("candidates", value="greedy"), "plan: field 'candidates' must be a list, got 'greedy'"),
    "candidate": (put("candidates", 0, value=["x"]), "plan, candidate 0: must be [solver, peak_bytes, overhead], got"),
    "its peak": (put("candidates", 0, 1, value="1"), "plan, candidate 0: field 'peak_bytes' must be an integer, got"),
    "no order": (drop("order"), "plan: field 'order' is missing"),
    "order": (put("order", 2, value=5), "plan: field 'order' must hold op indices below 5, got 5 for run 2"),
    "order name": (put("order", 2, value="f2"), "plan: field 'order' must hold op indices below 5, got 'f2' for run 2"),
    "frees": (put("frees", value={}), "plan: field 'frees' must be a list, got {}"),
    "frees run": (put("frees", 1, value="a"), "plan, run 1: field 'frees' must be a list of values, got 'a'"),
    "frees id": (put("frees", 1, value=["q"]), "plan, run 1: field 'frees' names value 'q', which is not among"),
    "frees index": (put("frees", 1, value=[6]), "plan, run 1: field 'frees' names value 6, which is not among"),
    "frees true": (put("frees", 1, value=[True]), "plan, run 1: field 'frees' names value True, which is not among"),
    "frees short": (drop("frees", 0), "plan: field 'frees': a schedule needs one entry of frees per run: 5 for 6"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_PLANS.values(), ids=REFUSED_PLANS.keys())
def test_refuses_plans(change: Change, message: str) -> None:
    data = plan_to_data(chain_plan())
    change(data)
    with pytest.raises(InvalidProgram, match=re.escape(message)):
        Plan.from_json(data)


def test_refuses_text_that_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(InvalidProgram, match=r"the text is not valid JSON: .* line 1 column 2"):
        Program.from_json("{format}")
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(InvalidProgram, match=r"list.json' is not a JSON object"):
        Program.from_json(path)
    path.write_text("values:")
    with pytest.raises(InvalidProgram, match=r"list.json' is not valid JSON"):
        Program.from_json(str(path))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("no-such-file.json")):
        Program.from_json("no-such-file.json")


def test_refuses_to_write_numbers_that_json_cannot_hold() -> None:
    with pytest.raises(InvalidProgram, match="field 'overhead': JSON holds finite numbers only, got inf"):
        chain_plan(overhead=float("inf")).to_json()
