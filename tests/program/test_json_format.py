"""Programs and plans as JSON: round trips, golden files, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.program import InvalidProgram, Once, Op, Plan, Program, Schedule, Value, verify
from autoremat.program.json_format import plan_to_data, program_to_data
from autoremat.program.model import Kind
from autoremat.program.once import Reason
from tests.program.hand import chain, chain_plan, in_place, split
from tests.strategies import orders, programs

GOLDEN = Path(__file__).parent / "golden"
DOCS = Path(__file__).parents[2] / "docs" / "program-file.md"

DESIGN = """
{"format": "autoremat-program", "version": 1, "name": "vgg16-b256",
 "values": [{"id": "x", "bytes": 154140672, "fixed": true}, {"id": "a1", "bytes": 3288334336}, {"id": "y", "bytes": 4, "held": "end"}],
 "ops": [{"name": "conv1", "reads": ["x"], "writes": ["a1"], "seconds": 0.012, "scratch_bytes": 0, "phase": "forward"},
         {"name": "loss", "reads": ["a1"], "writes": ["y"], "seconds": 0.001, "repeatable": "no: random"}]}
"""  # noqa: E501 - literally as the design has it


def test_the_example_of_the_design_is_read_as_it_stands() -> None:
    values = (Value("x", 154140672, fixed=True), Value("a1", 3288334336), Value("y", 4, held=-1))
    ops = (Op("conv1", (0,), (1,), 0.012), Op("loss", (1,), (2,), 0.001, once=Once.GIVEN, note="random"))
    assert Program.from_json(DESIGN) == Program("vgg16-b256", values, ops)


def everything() -> Program:
    """Every field of the format with something else than its default."""
    values = (
        Value("x", 8, fixed=True, label="input float32[2]", kind="input", module="net"),
        Value("a", 8, held=1, dtype="float32", shape=(2, 1)),
        Value("ä.1", 8, held=-1),
        Value("b", 0, held=0),
    )
    ops = (
        Op("f", (0,), (1, 3), 0.5, 3, module="net.0", source="model.py:3"),
        Op(
            "relu_",
            (1,),
            (2,),
            1e-7,
            0,
            "backward",
            Once.GIVEN,
            ((2, 1),),
            note="it has an effect: prints",
            kind="step",
        ),
    )
    return Program("everything", values, ops, timing="measured")


@pytest.mark.parametrize("name", ["chain", "in_place", "everything"])
def test_programs_of_version_1_are_read(name: str) -> None:
    program = {"chain": chain, "in_place": in_place, "everything": everything}[name]()
    found = Program.from_json(GOLDEN / "version-1" / f"{name}.json")
    as_then = tuple(replace(op, kind="op") for op in program.ops)  # there were no kinds
    assert found == replace(program, ops=as_then)


def test_plans_of_version_1_are_read() -> None:
    assert Plan.from_json(GOLDEN / "version-1" / "chain-plan.json") == chain_plan()


@pytest.mark.parametrize(
    ("sentence", "once", "note"),
    [
        ("backward", Once.BACKWARD, ""),
        ("overwrites fc.bias", Once.OVERWRITES, "fc.bias"),
        ("it rains", Once.GIVEN, "it rains"),
    ],
)
def test_sentences_of_version_1_are_reasons(sentence: str, once: Once, note: str) -> None:
    data = json.loads(DESIGN)
    data["ops"][1]["repeatable"] = f"no: {sentence}"
    op = Program.from_json(data).ops[1]
    assert (op.once, op.note) == (once, note)


@pytest.mark.parametrize("once", Once)
def test_every_reason_is_read_as_it_was_written(once: Once) -> None:
    op = Op("f", (), (), once=once, note="x" if "{}" in once.value else "")
    program = Program("one", (), (op,))
    assert Program.from_json(program.to_json()) == program
    assert Reason.read(op.why) == (once, op.note)


@pytest.mark.parametrize("value", [False, "no", "no: "])
def test_repeatable_of_version_1_is_checked(value: object) -> None:
    data = json.loads(DESIGN)
    data["ops"][1]["repeatable"] = value
    with pytest.raises(InvalidProgram, match="field 'repeatable' must be"):
        Program.from_json(data)


@pytest.mark.parametrize("name", ["chain", "in_place", "everything"])
def test_golden_programs(name: str) -> None:
    program = {"chain": chain, "in_place": in_place, "everything": everything}[name]()
    path = GOLDEN / f"{name}.json"
    assert program.to_json() == path.read_text(encoding="utf-8")
    assert Program.from_json(path) == program


def test_golden_plan() -> None:
    path = GOLDEN / "chain-plan.json"
    assert chain_plan().to_json() == path.read_text(encoding="utf-8")
    plan = Plan.from_json(path)
    assert plan == chain_plan()
    assert verify(plan.program, plan) == ()


def test_examples_of_the_documentation_are_valid() -> None:
    texts = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names = [Program.from_json(text).name for text in texts]
    assert names == ["two-layer-step", "diamond"]
    for text in texts:
        program = Program.from_json(text)
        assert verify(program, Schedule.plain(program)) == ()


def test_messages_of_the_documentation_are_the_real_ones() -> None:
    documentation = DOCS.read_text(encoding="utf-8")
    example = json.loads(re.findall(r"```json\n(.*?)```", documentation, re.DOTALL)[0])
    for change in (
        lambda data: data["ops"][1].update(reads=["g"]),
        lambda data: data["values"][4].update(bytes="4 KiB"),
    ):
        data = copy.deepcopy(example)
        change(data)
        with pytest.raises(InvalidProgram) as caught:
            Program.from_json(data)
        assert f"InvalidProgram: {caught.value}\n" in documentation


# --- Round trips ------------------------------------------------------------------------------------------------------

texts = st.text(max_size=6)


@st.composite
def labelled(draw: st.DrawFn) -> Program:
    """Random programs with any text wherever a text may stand."""
    program = draw(programs())
    shapes = st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple)
    words = st.fixed_dictionaries(dict.fromkeys(("label", "kind", "dtype", "module"), texts) | {"shape": shapes})
    values = tuple(Value(v.id, v.nbytes, v.fixed, v.held, **draw(words)) for v in program.values)
    ops = tuple(
        Op(
            draw(texts),
            op.reads,
            op.writes,
            op.seconds,
            op.scratch_bytes,
            draw(texts),
            once := draw(st.sampled_from([None, *Once])),
            op.in_place,
            note=draw(texts) if once else "",
            kind=draw(st.sampled_from(get_args(Kind))),
        )
        for op in program.ops
    )
    return Program(draw(texts), values, ops, timing=draw(texts))


@given(labelled())
def test_program_round_trip(program: Program) -> None:
    text = program.to_json()
    assert Program.from_json(text) == program
    assert Program.from_json(json.loads(text)) == program
    assert Program.from_json(text).to_json() == text


@given(st.data())
def test_plan_round_trip(data: st.DataObject) -> None:
    program = data.draw(programs())
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    numbers, fractions = st.integers(0, 10**15), st.floats(allow_nan=False, allow_infinity=False)
    bytes_ = [data.draw(numbers) for _ in range(4)]
    candidates = tuple(data.draw(st.lists(st.tuples(texts, numbers, fractions), max_size=2)))
    rates, name, least = (
        (data.draw(fractions), data.draw(fractions)),
        data.draw(texts),
        data.draw(st.integers(0, 2**63 - 1)),
    )
    plan = Plan(program, schedule, *bytes_, *rates, name, candidates, floor_lower_bound_bytes=least)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(json.loads(plan.to_json())) == plan


def test_files(tmp_path: Path) -> None:
    text = chain().to_json(tmp_path / "chain.json")
    assert (tmp_path / "chain.json").read_bytes() == text.encode()
    assert Program.from_json(tmp_path / "chain.json") == chain()
    assert Program.from_json(str(tmp_path / "chain.json")) == chain()
    chain_plan().to_json(str(tmp_path / "plan.json"))
    assert Plan.from_json(tmp_path / "plan.json") == chain_plan()


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(DESIGN, encoding="utf-8-sig")
    assert Program.from_json(tmp_path / "p.json").name == "vgg16-b256"


def test_defaults_are_left_out() -> None:
    data = program_to_data(split())
    assert data["values"][2] == {"id": "q", "bytes": 5}
    assert data["ops"][0] == {"name": "split", "reads": ["x"], "writes": ["p", "q"], "seconds": 1.0}
    assert "timing" not in data
    data = plan_to_data(chain_plan(candidates=(), floor_lower_bound_bytes=0))
    assert not {"candidates", "floor_lower_bound_bytes"} & data.keys()
    assert Plan.from_json(data) == chain_plan(candidates=(), floor_lower_bound_bytes=0)


def test_one_value_op_or_run_per_line() -> None:
    lines = chain_plan().to_json().splitlines()
    assert sum(line.strip().startswith('{"id"') for line in lines) == len(chain().values)
    assert sum(line.strip().startswith('{"name"') for line in lines) == len(chain().ops)
    assert '  ["b", "c"],' in lines


def test_unknown_fields_are_ignored() -> None:
    data = plan_to_data(chain_plan())
    for item in (data, data["program"], data["program"]["values"][0], data["program"]["ops"][0]):
        item["x-colour"] = "blue"
    assert Plan.from_json(data) == chain_plan()


def test_repeated_reads() -> None:
    data = program_to_data(chain())
    data["ops"][3]["reads"] = ["b", "c", "b"]
    assert Program.from_json(data) == chain()


def test_whole_seconds_are_numbers() -> None:
    data = program_to_data(chain())
    data["ops"][0]["seconds"] = 1
    assert Program.from_json(data) == chain()


def test_frees_may_be_indices_or_left_out() -> None:
    data = plan_to_data(chain_plan())
    data["frees"] = [[], [1], [], [2, "c"], [], [1, 4, 5]]
    assert Plan.from_json(data) == chain_plan()
    del data["frees"]
    assert Plan.from_json(data) == chain_plan()


# --- Refusals ---------------------------------------------------------------------------------------------------------

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
