"""What a program knows about itself, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from autoremat.program import END, InfeasibleBudget, InvalidProgram, Op, Program, Value
from tests.program.hand import chain, in_place

X, A, Y = Value("x", 4, fixed=True), Value("a", 8), Value("y", 4)
F, G = Op("f", (0,), (1,), 1.0), Op("g", (1,), (2,), 2.0)


def test_tables_of_the_chain() -> None:
    program = chain()
    assert program.seconds == 8.0
    assert program.fixed_bytes == 10
    assert program.producer == (-1, 0, 1, 2, 3, 4)
    assert program.readers == ((0,), (1, 4), (2, 3), (3,), (4,), ())
    assert program.hold == (-1,) * 6
    assert (program.label(1), program.label(3)) == ("a", "loss")


def test_hold_end_means_the_last_op() -> None:
    values = (X, dataclasses.replace(A, held=0), dataclasses.replace(Y, held=END))
    assert Program("p", values, (F, G)).hold == (-1, 0, 1)


def test_a_value_read_twice_by_one_op_is_kept_once() -> None:
    assert Op("mul", (1, 0, 1), (2,)).reads == (1, 0)


def test_lists_become_tuples() -> None:
    assert Program("p", [X, A, Y], [Op("f", [0], [1], 1.0), G]) == Program("p", (X, A, Y), (F, G))  # type: ignore[arg-type]


def test_an_empty_program_is_one() -> None:
    assert Program("nothing", (), ()).seconds == 0


def test_programs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        chain().name = "other"  # type: ignore[misc]


def test_a_value_may_be_held_until_the_op_that_overwrites_it() -> None:
    program = in_place()
    held = tuple(dataclasses.replace(v, held=2) if v.id == "a" else v for v in program.values)
    assert Program("held", held, program.ops).hold[1] == 2


def with_op(**fields: object) -> tuple[Value | Op, ...]:
    return (X, A, Y, dataclasses.replace(F, **fields), G)


def overwriting(*later: Op, **held: object) -> tuple[Value | Op, ...]:
    """``f`` makes ``a``, ``relu_`` overwrites it by ``y``, then other ops follow."""
    relu = Op("relu_", (1,), (2,), in_place=((2, 1),))
    return (X, dataclasses.replace(A, **held), Y, Value("z", 4), F, relu, *later)


REFUSED = {
    "id twice": ((X, A, A, F, G), "value id 'a' is used twice"),
    "negative bytes": ((X, Value("a", -8), Y, F, G), "value 'a': bytes must not be negative, got -8"),
    "held by no op": ((X, Value("a", 8, held=2), Y, F, G), "value 'a': held names op 2, but the program has 2 ops"),
    "held below end": ((X, Value("a", 8, held=-2), Y, F, G), "value 'a': held names op -2"),
    "negative seconds": (with_op(seconds=-1.0), r"op 0 \(f\): seconds must be finite and not negative, got -1.0"),
    "endless": (with_op(seconds=math.inf), r"op 0 \(f\): seconds must be finite and not negative, got inf"),
    "no number": (with_op(seconds=math.nan), r"op 0 \(f\): seconds must be finite and not negative, got nan"),
    "negative scratch": (with_op(scratch_bytes=-1), r"op 0 \(f\): scratch_bytes must not be negative, got -1"),
    "reads no value": (with_op(reads=(3,)), r"op 0 \(f\) names value number 3, but the program has 3 values"),
    "writes no value": (with_op(writes=(-1,)), r"op 0 \(f\) names value number -1"),
    "reads before written": ((X, A, Y, G, F), r"op 0 \(g\) reads value 'a' before any op writes it; mark inputs"),
    "reads what it writes": (with_op(reads=(1,)), r"op 0 \(f\) reads value 'a' before any op writes it"),
    "writes fixed": (
        with_op(writes=(0,)),
        r"op 0 \(f\) writes value 'x', which is fixed; give each version its own id",
    ),
    "written twice": ((X, A, Y, F, F), r"op 1 \(f\) writes value 'a', which is already written"),
    "written twice by one op": (with_op(writes=(1, 1)), r"op 0 \(f\) writes value 'a', which is already written"),
    "in place of what is not read": (with_op(in_place=((1, 2),)), r"op 0 \(f\): in_place pairs must name a written"),
    "in place by what is not written": (with_op(in_place=((0, 0),)), r"op 0 \(f\): in_place pairs must name a written"),
    "in place of fixed": (with_op(in_place=((1, 0),)), r"op 0 \(f\): in_place takes over fixed value 'x', which never"),
    "in place twice": (
        (X, A, Y, Value("z", 4), F, Op("g", (1,), (2, 3), in_place=((2, 1), (3, 1)))),
        r"op 1 \(g\): in_place names a value twice; one storage is taken over by one value",
    ),
    "read after it was overwritten": (
        overwriting(Op("late", (1,), (3,))),
        r"op 2 \(late\) reads value 'a', which op 1 \(relu_\) has overwritten in place; read the version written there",
    ),
    "held after it was overwritten": (
        overwriting(Op("late", (2,), (3,)), held=2),
        r"op 1 \(relu_\): in_place takes over value 'a', which is held until op 2; held must end at op 1 at the latest",
    ),
    "held to the end after it was overwritten": (
        overwriting(Op("late", (2,), (3,)), held=END),
        r"op 1 \(relu_\): in_place takes over value 'a', which is held until op 2",
    ),
}


@pytest.mark.parametrize(("parts", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(parts: tuple[Value | Op, ...], message: str) -> None:
    values = tuple(part for part in parts if isinstance(part, Value))
    ops = tuple(part for part in parts if isinstance(part, Op))
    with pytest.raises(InvalidProgram, match=message):
        Program("refused", values, ops)


def test_infeasible_budget_survives_pickling() -> None:
    error = InfeasibleBudget(
        "no way", budget_bytes=1, floor_bytes=2, peak_op="mm", largest=(("a", 2),), arrived=(("gradients", 1),)
    )
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == "no way"
    assert vars(copy) == vars(error)
    assert (copy.budget_bytes, copy.floor_bytes, copy.peak_op) == (1, 2, "mm")
    assert (copy.largest, copy.arrived) == ((("a", 2),), (("gradients", 1),))
