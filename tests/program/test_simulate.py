"""``simulate`` against numbers worked out on paper, and against an account that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.program import InvalidSchedule, Op, Program, Schedule, Value, simulate
from tests.program.hand import CHAIN_AGAIN, chain, chain_plan, in_place, split
from tests.strategies import orders, programs


def bytes_of(program: Program, *order: int) -> tuple[int, ...]:
    return simulate(program, Schedule.from_order(program, order)).resident_bytes


def test_plain_chain() -> None:
    #   x  a  b  c db da scratch
    # 0 10 20                     30
    # 1 10 20 30                  60
    # 2 10 20 30 5                65
    # 3 10 20 30 5 30             95
    # 4 10 20      30 20 7        87
    timeline = simulate(chain())
    assert timeline.resident_bytes == (30, 60, 65, 95, 87)
    assert (timeline.peak_bytes, timeline.peak_run, timeline.peak_op) == (95, 3, 3)
    assert timeline.resident_at_peak == (2, 4, 1, 0, 3)
    assert (timeline.seconds, timeline.extra_seconds, timeline.repeats) == (8.0, 0.0, ())


def test_chain_with_a_further_run() -> None:
    #   x  a  b  c db da scratch
    # 0 10 20                     30
    # 1 10 20 30                  60
    # 2 10    30 5                45
    # 3 10    30 5 30             75
    # 0 10 20      30             60
    # 4 10 20      30 20 7        87
    timeline = simulate(chain(), Schedule.from_order(chain(), CHAIN_AGAIN))
    assert timeline.resident_bytes == (30, 60, 45, 75, 60, 87)
    assert (timeline.peak_bytes, timeline.peak_run, timeline.peak_op) == (87, 5, 4)
    assert timeline.resident_at_peak == (4, 1, 5, 0)
    assert (timeline.seconds, timeline.extra_seconds, timeline.repeats) == (9.0, 1.0, ((0, 1),))


def test_a_plan_is_simulated_by_its_schedule() -> None:
    assert simulate(chain(), chain_plan()) == simulate(chain(), Schedule.from_order(chain(), CHAIN_AGAIN))


def test_in_place_takes_over_the_storage() -> None:
    assert bytes_of(in_place(), 0, 1, 2, 3) == (12, 13, 13, 15)


def test_in_place_on_a_copy_counts_both() -> None:
    # the further run of relu_ (run 4) leaves a for the further run of h: x a r = 4 + 8 + 8, then z = 1
    assert bytes_of(in_place(), 0, 1, 2, 0, 2, 1, 3) == (12, 13, 12, 12, 20, 21, 15)


def test_of_a_storage_taken_over_the_written_value_is_there() -> None:
    values = (Value("a", 8), Value("r", 8))
    program = Program("p", values, (Op("f", (), (0,)), Op("relu_", (0,), (1,), scratch_bytes=1, in_place=((1, 0),))))
    assert simulate(program).resident_at_peak == (1,)


@pytest.mark.parametrize(("before", "after", "during"), [(8, 12, 12), (12, 8, 12)])
def test_in_place_with_another_size_counts_the_larger(before: int, after: int, during: int) -> None:
    values = (Value("a", before), Value("r", after), Value("y", 1))
    ops = (Op("f", (), (0,)), Op("resize_", (0,), (1,), in_place=((1, 0),)), Op("g", (1,), (2,)))
    assert simulate(Program("resize", values, ops)).resident_bytes == (before, during, after + 1)


def test_a_value_written_while_it_is_resident_is_there_twice() -> None:
    # run 2 computes q again, and with it p = 3, which is still held: 4 + 3 and another 3 + 5
    assert bytes_of(split(), 0, 1, 0, 2) == (12, 13, 15, 14)


def test_nothing_runs() -> None:
    timeline = simulate(Program("nothing", (Value("x", 3, fixed=True),), ()))
    assert (timeline.peak_bytes, timeline.peak_run, timeline.peak_op) == (3, -1, -1)
    assert timeline.resident_at_peak == (0,)


REFUSED = {
    "op": (Schedule((5,), ((),)), "run 0 names op 5, but the program has 5 ops"),
    "negative op": (Schedule((-1,), ((),)), "run 0 names op -1"),
    "read": (Schedule((0, 1), ((1,), ())), r"run 1: op 1 \(f1\) reads 'a', which is not resident"),
    "free": (Schedule((0,), ((3,),)), r"run 0: op 0 \(f0\) is followed by a free of 'loss', which is not resident"),
    "free twice": (Schedule((0,), ((1, 1),)), r"run 0: op 0 \(f0\) is followed by a free of 'a', which is not"),
    "free of nothing": (Schedule((0,), ((9,),)), "a free of value number 9, which is not resident"),
}


@pytest.mark.parametrize(("schedule", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(schedule: Schedule, message: str) -> None:
    with pytest.raises(InvalidSchedule, match=message):
        simulate(chain(), schedule)


def count_by_definition(program: Program, schedule: Schedule) -> tuple[int, ...]:
    """The account straight from the docstring, each run from the beginning: quadratic, and nothing is remembered."""
    counts = []
    for p, i in enumerate(schedule.order):
        there = {v for v, value in enumerate(program.values) if value.fixed}
        for earlier in range(p):
            there |= set(program.ops[schedule.order[earlier]].writes)
            there -= set(schedule.frees[earlier])
        op = program.ops[i]
        taken_over = [new for new, old in op.in_place if old in schedule.frees[p]]
        new = [v for v in op.writes if v not in taken_over]
        counts.append(sum(program.values[v].nbytes for v in [*there, *new]) + op.scratch_bytes)
    return tuple(counts)


@given(st.data())
def test_agrees_with_the_definition(data: st.DataObject) -> None:
    program = data.draw(programs())
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    timeline = simulate(program, schedule)
    assert timeline.resident_bytes == count_by_definition(program, schedule)
    assert timeline.peak_bytes == max(timeline.resident_bytes)
    assert timeline.resident_bytes.index(timeline.peak_bytes) == timeline.peak_run
    assert timeline.peak_op == schedule.order[timeline.peak_run]
    assert timeline.seconds == sum(program.ops[i].seconds for i in schedule.order)
    assert timeline.extra_seconds == timeline.seconds - program.seconds


@given(st.data())
def test_what_is_resident_at_the_peak_fills_it(data: st.DataObject) -> None:
    """But for scratch, and for values that are written while they are resident (those are there twice)."""
    program = data.draw(programs())
    order = data.draw(orders(program))
    timeline = simulate(program, Schedule.from_order(program, order))
    op = program.ops[timeline.peak_op]
    filled = sum(program.values[v].nbytes for v in timeline.resident_at_peak) + op.scratch_bytes
    again = sum(program.values[v].nbytes for v in op.writes) if timeline.peak_op in order[: timeline.peak_run] else 0
    assert filled <= timeline.peak_bytes <= filled + again


@given(st.data())
def test_no_schedule_of_the_same_order_with_a_later_free_needs_less(data: st.DataObject) -> None:
    program = data.draw(programs())
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    frees = [list(f) for f in schedule.frees]
    p = data.draw(st.integers(0, len(frees) - 1))
    later = [v for v in frees[p] if all(v not in program.ops[i].writes for i in schedule.order[p + 1 :])]
    for v in later:
        frees[p].remove(v)
        frees[-1].append(v)
    lazy = simulate(program, Schedule(schedule.order, tuple(tuple(f) for f in frees)))
    eager = simulate(program, schedule)
    assert all(a >= b for a, b in zip(lazy.resident_bytes, eager.resident_bytes, strict=True))
