"""Programs and plans as JSON: round trips, golden files, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

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
