"""Folding and unfolding: the same program again, whatever it is and however many repetitions are asked for."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path

import pytest

from autoremat.program import InvalidProgram, Op, Program, Value, simulate
from autoremat.program.repeats import KEPT, Layout, Repeated, counterparts, fold, is_same, unfold, with_times
from tests.planner.layers import recurrence, stack

GPT = Path(__file__).parents[2] / "benchmarks" / "programs" / "gpt-24.json.xz"


def recorded() -> Program:
    return Program.from_json(json.loads(lzma.decompress(GPT.read_bytes())))


@pytest.mark.parametrize("program", [stack(20), stack(13), recurrence(16), recorded()], ids=lambda p: p.name)
def test_what_is_folded_unfolds_to_the_same(program: Program) -> None:
    folded = fold(program)
    assert folded is not None
    assert is_same(unfold(folded), program)
    assert len(folded.program.ops) < len(program.ops)
    assert folded.ops == len(program.ops)


@pytest.mark.parametrize("make", [stack, recurrence])
@pytest.mark.parametrize("times", [KEPT, 15, 31])
def test_any_number_is_what_it_would_have_been(make: type, times: int) -> None:
    """Folded from 16 and written out as often, it is the program that was made that way."""
    folded = fold(make(16))
    assert folded is not None
    rest = 16 - folded.times
    assert is_same(unfold(folded, times), make(times + rest))


def test_a_folded_program_is_a_file_that_reads_as_all_of_it() -> None:
    folded = fold(recorded())
    assert folded is not None
    text = replace(folded, times=30).to_json()
    assert Repeated.from_json(text) == replace(folded, times=30)
    assert Program.from_json(text) == unfold(folded, 30)
    data = json.loads(text)
    del data["repeats"]
    assert Program.from_json(data) == folded.program


@pytest.mark.parametrize(
    "change",
    [
        {"times": 1},
        {"count": 0},
        {"forward": [4]},
        {"forward": [4, -1]},
        {"backward": [82, 4800]},
        {"forward": [300, 10]},
    ],
)
def test_repetitions_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    folded = fold(recorded())
    assert folded is not None
    data = json.loads(folded.to_json())
    with pytest.raises(InvalidProgram, match="repeats"):
        Program.from_json(data | {"repeats": data["repeats"] | change})


def test_layers_have_their_own_names() -> None:
    folded = fold(recorded())
    assert folded is not None
    modules = {op.module.split(".")[1] for op in unfold(folded, 40).ops if op.module.startswith("blocks.")}
    assert modules == {str(k) for k in range(40)}


def test_what_does_not_repeat_itself_is_not_folded() -> None:
    values = (Value("x", 4, fixed=True), *(Value(f"v{k}", 4 + k * k) for k in range(40)))
    assert fold(Program("growing", values, tuple(Op("f", (k,), (k + 1,), 1.0) for k in range(40)))) is None


def test_one_layer_that_is_unlike_the_others_is_left_outside() -> None:
    program = stack(40)
    ops = list(program.ops)
    ops[30] = replace(ops[30], seconds=7.0)
    changed = replace(program, ops=tuple(ops))
    folded = fold(changed)
    assert folded is not None
    assert is_same(unfold(folded), changed)


def test_a_value_read_by_all_repetitions_stays_one() -> None:
    folded = fold(recurrence(16))
    assert folded is not None
    assert sum(v.fixed for v in unfold(folded, 30).values) == sum(v.fixed for v in recurrence(16).values)


def test_what_reads_all_repetitions_reads_the_copies_too() -> None:
    program = stack(20)
    made = tuple(program.ops[2 * k].writes[0] for k in range(20))
    gather = Op("stack", made, (len(program.values),), 1.0)
    ops = (*program.ops[:40], gather, *program.ops[40:])
    longer = replace(program, values=(*program.values, Value("all", 4)), ops=ops)
    folded = fold(longer)
    assert folded is not None
    more = unfold(folded, folded.times + 5)
    assert len(next(op for op in more.ops if op.name == "stack").reads) == 25


def test_bytes_grow_evenly() -> None:
    folded = fold(stack(20))
    assert folded is not None
    peaks = [simulate(unfold(folded, n)).peak_bytes for n in (10, 11, 12)]
    assert peaks[2] - peaks[1] == peaks[1] - peaks[0] > 0


def test_fewer_than_two_are_refused() -> None:
    folded = fold(stack(20))
    assert folded is not None
    with pytest.raises(InvalidProgram, match="at least 2"):
        with_times(folded.program, folded.layout, 1)


def test_every_value_has_one_counterpart_in_the_middle() -> None:
    folded = fold(stack(20))
    assert folded is not None
    same = counterparts(folded.program, folded.layout)
    assert all(same[v] == v for v in same)


def test_grouped_repetitions_are_the_same_ones() -> None:
    layout = Layout(13, (2, 3), (50, 7)).grouped(4)
    assert layout == Layout(3, (5, 12), (50, 28))
    assert layout.repetition_of(5) == 0
    assert layout.repetition_of(50) == 2
    assert layout.repetition_of(4) == -1
