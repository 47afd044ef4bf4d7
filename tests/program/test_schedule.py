"""``Schedule.from_order``: what leaves when. Frees are written as ids."""

from __future__ import annotations

import pytest

from autoremat.program import END, InvalidSchedule, Once, Op, Program, Schedule, Value, simulate
from tests.program.hand import CHAIN_AGAIN, chain, handed, in_place, split


def freed(program: Program, *order: int) -> list[str]:
    """For every run the ids that leave after it."""
    schedule = Schedule.from_order(program, order)
    return [" ".join(program.values[v].id for v in frees) for frees in schedule.frees]


def test_plain_chain_keeps_each_value_until_its_last_reader() -> None:
    assert freed(chain(), 0, 1, 2, 3, 4) == ["", "", "", "b c", "a db da"]
    assert Schedule.plain(chain()) == Schedule.from_order(chain(), range(5))


def test_a_value_that_is_written_again_leaves_in_between() -> None:
    assert freed(chain(), *CHAIN_AGAIN) == ["", "a", "", "b c", "", "a db da"]


def test_the_taken_over_value_leaves_with_the_in_place_op() -> None:
    assert freed(in_place(), 0, 1, 2, 3) == ["", "", "a", "z r y"]


def test_a_further_run_in_place_may_work_on_a_copy() -> None:
    assert freed(in_place(), 0, 1, 2, 0, 2, 1, 3) == ["", "z", "a r", "", "", "a", "z r y"]


def test_a_value_read_after_it_was_taken_over_cannot_be_had() -> None:
    program = in_place()
    schedule = Schedule.from_order(program, (0, 1, 2, 1, 3))
    assert schedule.frees[2] == (1,)
    with pytest.raises(InvalidSchedule, match=r"run 3: op 1 \(h\) reads 'a', which is not resident"):
        simulate(program, schedule)


def test_a_held_value_stays_while_its_sibling_is_computed_again() -> None:
    assert freed(split(), 0, 1, 0, 2) == ["", "q u", "", "p q s"]


def test_what_the_backward_was_handed_stays_while_it_is_made_again_beside_it() -> None:
    program = handed()
    assert program.handed_until == (-1, -1, 4, 4, -1)
    assert freed(program, 0, 1, 2, 0, 3, 4) == ["", "b", "", "", "", "a b y"]
    schedule = Schedule.from_order(program, (0, 1, 2, 0, 3, 4))
    assert simulate(program, schedule).resident_bytes[3] == 1 + 1 + 2 * 4 + 2


def test_nodes_that_ask_for_the_same_value_are_handed_a_copy_each() -> None:
    backward = {"phase": "backward", "once": Once.BACKWARD}
    values = (Value("x", 1, fixed=True), Value("a", 4))
    use, ask = Op("use", (1,), (), **backward), Op("unpack", (1,), (), **backward, kind="ask")
    program = Program("asked", values, (Op("f", (0,), (1,)), ask, use, ask, ask, use))
    assert program.handed_until == (-1, 2, -1, 5, 5, -1)
    assert freed(program, 0, 1, 2, 0, 3, 0, 4, 5) == ["", "", "a", "", "", "", "", "a"]


def test_a_value_is_freed_after_the_first_run_of_the_op_that_holds_it() -> None:
    values = (Value("x", 1, fixed=True), Value("a", 1, held=1), Value("b", 1), Value("c", 1))
    program = Program("held", values, (Op("f", (0,), (1,)), Op("g", (0,), (2,)), Op("h", (0,), (3,))))
    assert freed(program, 0, 0, 1, 1, 2) == ["", "", "a b", "b", "c"]


def test_held_before_it_is_written_does_not_matter() -> None:
    values = (Value("x", 1, fixed=True), Value("a", 1), Value("b", 1, held=0))
    program = Program("held", values, (Op("f", (0,), (1,)), Op("g", (0,), (2,))))
    assert freed(program, 0, 1) == ["a", "b"]


def test_held_to_the_end_leaves_with_the_last_op() -> None:
    values = (Value("x", 1, fixed=True), Value("a", 1, held=END), Value("b", 1))
    program = Program("held", values, (Op("f", (0,), (1,)), Op("g", (0,), (2,))))
    assert freed(program, 0, 1) == ["", "a b"]


def test_counts_and_extra_seconds() -> None:
    schedule = Schedule.from_order(chain(), (0, 1, 2, 0, 1, 0, 3, 4))
    assert schedule.runs_of == {0: 3, 1: 2, 2: 1, 3: 1, 4: 1}
    assert schedule.extra_seconds(chain()) == 2 * 1.0 + 2.0


def test_lists_become_tuples() -> None:
    assert Schedule([0], [[1]]) == Schedule((0,), ((1,),))  # type: ignore[arg-type]


@pytest.mark.parametrize("op", [5, -1])
def test_refuses_an_op_that_does_not_exist(op: int) -> None:
    with pytest.raises(InvalidSchedule, match=f"run 1 names op {op}, but the program has 5 ops"):
        Schedule.from_order(chain(), (0, op))


def test_refuses_frees_that_do_not_match_the_order() -> None:
    with pytest.raises(InvalidSchedule, match="one entry of frees per run: 1 for 2"):
        Schedule((0, 1), ((),))
