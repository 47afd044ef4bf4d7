"""Explanations: every breakdown adds up to the simulated peak, to the byte; reasons as worked out by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.program import END, Once, Op, Program, Schedule, Value, simulate
from autoremat.show.blocks import blocks_of, useless_blocks
from autoremat.show.explanation import Explanation, explanation_of
from autoremat.show.modules import Module
from autoremat.show.page import PLAIN_WIDTH, page_width
from autoremat.show.residents import CATEGORIES, Resident, residents_at
from tests.program.hand import BACKWARD, chain, chain_plan, in_place
from tests.show.placed import placed, schedules


def explained(program: Program, schedule: Schedule) -> Explanation:
    timeline = simulate(program, schedule)
    plan = replace(chain_plan(), program=program, schedule=schedule, peak_bytes=timeline.peak_bytes)
    return explanation_of(program, plan)


@given(st.data())
def test_residents_add_up_at_every_run(data: st.DataObject) -> None:
    program = data.draw(placed())
    schedule = data.draw(schedules(program))
    for run, nbytes in enumerate(simulate(program, schedule).resident_bytes):
        assert sum(r.nbytes for r in residents_at(program, schedule, run)) == nbytes


@given(st.data())
def test_every_breakdown_adds_up_to_the_peak(data: st.DataObject) -> None:
    program = data.draw(placed())
    schedule = data.draw(schedules(program))
    timeline, e = simulate(program, schedule), explained(program, schedule)
    assert e.peak_bytes == timeline.peak_bytes
    assert sum(e.categories.values()) == e.peak_bytes
    assert set(e.categories) <= set(CATEGORIES)
    assert sum(r.nbytes for r in e.residents) == e.modules.peak_bytes == e.peak_bytes
    assert e.modules.saved_bytes == e.saved_bytes
    assert e.modules.kept_bytes == e.kept_bytes
    assert [(a.op, a.runs) for a in e.savings.again] == list(timeline.repeats)
    assert e.modules.runs_again == sum(n for _, n in timeline.repeats)
    assert e.modules.seconds_again == timeline.extra_seconds


@given(st.data())
def test_the_tree_has_what_its_modules_have(data: st.DataObject) -> None:
    program = data.draw(placed())
    e = explained(program, data.draw(schedules(program)))
    for path, figures in leaves(e.modules):
        own = [r.nbytes for r in e.residents if r.module in path]
        assert sum(own) == figures.own_peak_bytes >= 0
        assert figures.times == len(path) or figures.name == ""


def leaves(module: Module, above: frozenset[str] = frozenset([""])) -> Iterator[tuple[frozenset[str], Module]]:
    """Every node of the tree with the paths of the modules that it stands for."""
    here = above
    for part in filter(None, module.name.split(".")):
        here = frozenset(f"{a}.{n}" if a else n for a in here for n in unfolded(part))
    yield here, module
    for below in module.modules:
        yield from leaves(below, here)


def unfolded(name: str) -> list[str]:
    """``0-2,5`` is 0, 1, 2 and 5."""
    if not re.fullmatch(r"[\d,-]+", name):
        return [name]
    spans = [[int(n) for n in span.split("-")] for span in name.split(",")]
    return [str(n) for span in spans for n in range(span[0], span[-1] + 1)]


@given(st.data())
def test_plain_training_keeps_what_it_saves(data: st.DataObject) -> None:
    program = data.draw(placed())
    e = explanation_of(program)
    assert e.savings.kept == e.saved
    assert e.savings.again == ()
    assert e == explanation_of(program)


@given(st.data())
def test_any_explanation_can_be_shown(data: st.DataObject) -> None:
    program = data.draw(placed())
    e = explained(program, data.draw(schedules(program)))
    assert max(map(len, str(e).splitlines())) <= 130
    assert json.loads(e.to_json())["peak_bytes"] == e.peak_bytes
    assert e._repr_html_().startswith("<pre")


def why(residents: tuple[Resident, ...]) -> dict[str, tuple[int, str, str]]:
    return {r.name: (r.nbytes, r.category, r.why) for r in residents}


def test_a_chain_by_hand() -> None:
    e = explanation_of(chain())
    assert (e.peak_bytes, e.peak_op) == (95, 3)
    assert why(e.residents) == {
        "db": (30, "temporaries", "being written"),
        "b": (30, "saved activations", "being read"),
        "a": (20, "saved activations", "waits for g1"),
        "x": (10, "inputs", "there during the whole step"),
        "loss": (5, "saved activations", "being read"),
    }
    assert {r.name: r.readers for r in e.residents if r.readers} == {"db": (4,), "a": (4,)}
    assert [chain().values[v].id for v in e.saved] == ["a", "b", "c"]


def test_its_plan_by_hand() -> None:
    e = explanation_of(chain(), chain_plan())
    assert why(e.residents)["a"] == (20, "recomputed activations", "being read")
    assert why(e.residents)["scratch of g1"] == (7, "scratch", "used inside the kernel that runs")
    assert [(a.op, a.runs, a.seconds, a.sources) for a in e.savings.again] == [(0, 1, 1.0, (0,))]
    assert [chain().values[v].id for v in e.savings.kept] == ["b", "c"]
    assert e.kept_bytes == 35
    assert "runs 1 ops again, 1 times: 1.00 s (given), +12.5%" in str(e)


def test_a_storage_that_is_taken_over_counts_once() -> None:
    program = in_place()
    rows = residents_at(program, Schedule.plain(program), 2)
    assert why(rows) == {
        "r": (8, "saved activations", "being written"),
        "x": (4, "inputs", "there during the whole step"),
        "z": (1, "saved activations", "waits for loss"),
    }


def test_two_copies_of_a_value_are_two_rows() -> None:
    program = chain()
    again = Schedule((0, 1, 2, 3, 0, 4), ((), (), (), (), (), ()))
    rows = [r for r in residents_at(program, again, 4) if r.name == "a"]
    assert [(r.nbytes, r.why, r.readers) for r in rows] == [
        (20, "about to be replaced by the copy that is being written", ()),
        (20, "being written", (4,)),
    ]


def step(**of_value: object) -> Program:
    """Forward, unpack, backward; ``a`` is saved, ``v`` is what the test makes of it."""
    values = (
        Value("w", 8, fixed=True, kind="parameter", label="net.0.weight", module="net.0"),
        Value("a", 16, label="net.0 float32[2, 2]", dtype="float32", shape=(2, 2)),
        Value("v", 4, **of_value),  # type: ignore[arg-type]
        Value("d", 16),
    )
    ops = (
        Op("aten.mm.default", (0,), (1,), module="net.0", source="folder/net.py:3"),
        Op("aten.sum.default", (1,), (2,), module="net.1"),
        Op("aten.ones.default", (), (3,), **BACKWARD),
        Op("unpack", (1,), (), module="net.1", **BACKWARD, kind="ask"),
        Op("aten.mul.Tensor", (1, 3), (), module="net.1", **BACKWARD),
    )
    return Program("step", values, ops)


def at_the_start_of_the_backward(program: Program) -> dict[str, Resident]:
    return {r.name: r for r in residents_at(program, Schedule.plain(program), 2)}


def test_what_is_saved_says_for_whom() -> None:
    saved = at_the_start_of_the_backward(step())["net.0 mm"]
    assert saved.why == "saved for the backward of net.1"
    assert (saved.category, saved.type, saved.module, saved.source) == (
        "saved activations", "float32[2, 2]", "net.0", "folder/net.py:3",
    )  # fmt: skip
    assert saved.readers == (3, 4)
    assert at_the_start_of_the_backward(step())["net.0.weight"].category == "parameters"


@pytest.mark.parametrize(
    ("held", "kind", "reason"),
    [
        (END, "", "held by Python to the end of the step"),
        (3, "", "held by Python or autograd until net.1 unpack"),
        (END, "gradient", "a gradient stays to the end of the step"),
    ],
)
def test_what_is_held_says_how_long(held: int, kind: str, reason: str) -> None:
    row = at_the_start_of_the_backward(step(held=held, kind=kind))["v"]
    assert (row.why, row.category) == (reason, "gradients" if kind else "temporaries")


def test_what_the_schedule_forgets_is_said_too() -> None:
    schedule = Schedule((0, 1, 2, 3, 4), ((), (), (), (), ()))
    assert {r.name: r.why for r in residents_at(step(), schedule, 2)}["v"] == "left in memory by the schedule"


# --- Blocks -----------------------------------------------------------------------------------------------------------


def layers(input_bytes: int, inner_bytes: int, n: int = 3) -> Program:
    """``n`` equal blocks: ``up`` makes a large value, ``down`` makes the next block's input; both are saved."""
    values, ops = [Value("x", input_bytes, fixed=True)], []
    for i in range(n):
        values += [Value(f"h{i}", inner_bytes), Value(f"y{i}", input_bytes)]
        ops += [Op("up", (2 * i,), (2 * i + 1,), 1.0, module=f"layers.{i}.up")]
        ops += [Op("down", (2 * i + 1,), (2 * i + 2,), 2.0, module=f"layers.{i}.down")]
    for i in reversed(range(n)):
        ops += [Op("unpack", (2 * i + 1,), (), module=f"layers.{i}.down", **BACKWARD, kind="ask")]
    return Program("layers", tuple(values), tuple(ops))


def test_a_block_frees_what_is_inside_and_pays_with_its_input() -> None:
    blocks = {b.path: b for b in blocks_of(layers(10, 100))}
    first, second = blocks["layers.0"], blocks["layers.1"]
    assert (first.saved_bytes, first.made_bytes, first.freed_bytes, first.input_bytes) == (100, 100, 100, 0)
    assert (second.freed_bytes, second.input_bytes, second.gain_bytes, second.seconds) == (100, 10, 90, 3.0)
    assert blocks["layers"].gain_bytes == 300
    assert blocks["layers.1"].why_not == ""


def test_an_input_as_large_as_what_is_saved_is_named() -> None:
    useless = {b.path: b.why_not for b in useless_blocks(blocks_of(layers(100, 100)))}
    assert useless.keys() == {"layers.1", "layers.2", "layers.0.down"}
    assert "its input (100 B) would have to stay and is as large as what it keeps" in useless["layers.1"]
    assert "all that it keeps for the backward (100 B) is its input" in useless["layers.0.down"]


def test_next_to_nothing_is_named() -> None:
    useless = {b.path: b.why_not for b in useless_blocks(blocks_of(layers(97, 100)))}
    assert "saves next to nothing (3 B of 100 B)" in useless["layers.1"]


def test_what_cannot_run_again_frees_nothing() -> None:
    program = layers(10, 100, n=1)
    ops = (replace(program.ops[0], once=Once.FOREIGN), *program.ops[1:])
    block = blocks_of(replace(program, ops=ops))[1]
    assert (block.path, block.made_bytes, block.freed_bytes) == ("layers.0", 100, 0)
    assert "is its input, or stays for the backward of others" in block.why_not


# --- Text -------------------------------------------------------------------------------------------------------------

GOLDEN = """\
Peak of layers, trained plainly: 500 B
  it stands at op 4 of 9, up (forward), layers.2.up
  for it a caching allocator such as CUDA's reserves 2.1 MB of a device
  plain training saves 300 B for the backward, in 3 values

 bytes  share  filled by
 ───────────────────────────────────────────────────
 100 B  20.0%  inputs             ██████
 300 B  60.0%  saved activations  ██████████████████
 100 B  20.0%  temporaries        ██████

 at peak  saved plainly  module
 ──────────────────────────────────────
   500 B          300 B  the whole step
   400 B          300 B    layers
   200 B          200 B      0,2
   200 B          200 B        up
   200 B          100 B      1
   100 B          100 B        up
   100 B                       down

 bytes       value  why it is in memory                      read next by
 ──────────────────────────────────────────────────────────────────────────────
 100 B  1 x  x      there during the whole step
 100 B  1 x  h0     saved for the backward of layers.0.down
 100 B  1 x  h1     saved for the backward of layers.1.down
 100 B  1 x  y1     being read
 100 B  1 x  h2     being written                            layers.2.down down

Checkpointing by hand would not pay here:
  layers.1-2 saves nothing, because its input (100 B) would have to stay and is as large as what it keeps
  layers.0.down saves nothing, because all that it keeps for the backward (100 B) is its input"""


def test_the_text_folds_layers_and_names_what_does_not_pay() -> None:
    assert str(explanation_of(layers(100, 100))) == GOLDEN


def test_equal_layers_are_one_line_of_the_tree() -> None:
    tree = explanation_of(layers(10, 100)).modules
    assert tree.peak_bytes == 320
    (whole,) = tree.modules
    assert [(m.name, m.times, m.saved_bytes) for m in whole.modules] == [("0,2", 2, 200), ("1", 1, 100)]
    assert [m.name for m in whole.modules[0].modules] == ["up", "down"]
    assert whole.modules[0].modules[0].times == 2


def test_an_empty_program_is_explained_too() -> None:
    e = explanation_of(Program("", (Value("x", 4, fixed=True),), ()))
    assert e.categories == {"inputs": 4}
    assert str(e).startswith("Peak, trained plainly: 4 B")


@pytest.mark.parametrize(("columns", "width"), [("30", 60), ("80", 80), ("500", 160)])
def test_tables_are_as_wide_as_the_terminal(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert page_width() == PLAIN_WIDTH
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert page_width() == width
    table = str(explanation_of(step())).split("\n\n")[3]
    assert "saved for the" in table
    assert max(map(len, table.splitlines())) <= width
