"""DTR: the score by hand, blindness for the future, and its budget."""

from __future__ import annotations

import pytest

from autoremat.planner import clock, solve
from autoremat.planner.search.evict import Rules, course_of
from autoremat.planner.search.tables import tables_of
from autoremat.planner.solvers.dtr import _Online, dtr_runs
from autoremat.planner.solvers.dtr import schedule as dtr
from autoremat.program import InfeasibleBudget, Op, Program, Schedule, Value, simulate, verify
from tests.planner.chains import gpt, uniform_steps


def star(sizes: tuple[int, ...], seconds: tuple[float, ...], demands: tuple[int, ...]) -> Program:
    """Values made one after the other from a fixed input, which the backward reads in the given order."""
    values = [Value("x", 0, fixed=True), *(Value(f"v{k}", size) for k, size in enumerate(sizes)), Value("end", 0)]
    ops = [Op(f"f{k}", (0,), (k + 1,), s) for k, s in enumerate(seconds)]
    ops += [Op("turn", (), (len(values) - 1,), 0.0, phase="backward")]
    ops += [Op(f"b{k}", (k + 1,), (), 0.0, phase="backward") for k in demands]
    return Program("star", tuple(values), tuple(ops))


def evicted(program: Program, limit: int) -> list[str]:
    """What is not in memory after the forward under a limit."""
    executor = _Online(course_of(tables_of(program)), Rules(limit, limit))
    forward = [i for i, op in enumerate(program.ops) if op.phase == "forward"]
    for t in forward:
        executor.step(t)
    return [program.values[v].id for v in executor.droppable if v not in executor.resident]


@pytest.mark.parametrize(
    ("sizes", "seconds", "gone"),
    [
        ((2, 2, 2), (1.0, 1.0, 1.0), "v0"),  # the stalest
        ((2, 2, 2), (9.0, 1.0, 1.0), "v1"),  # the cheapest, though not as stale
        ((2, 5, 2), (1.0, 1.0, 1.0), "v1"),  # the largest
    ],
)
def test_the_smallest_cost_per_byte_and_staleness_leaves(sizes, seconds, gone):
    program = star(sizes, seconds, (0, 1, 2))
    assert evicted(program, sum(sizes) - 1) == [gone]


def test_what_is_gone_makes_its_neighbours_dearer():
    values = (Value("x", 0, fixed=True), *(Value(v, 2) for v in "abcd"), Value("g", 0))
    ops = [Op("fa", (0,), (1,), 1.0), Op("fb", (1,), (2,), 5.0), Op("fc", (0,), (3,), 2.0), Op("fd", (0,), (4,), 9.0)]
    ops += [Op("turn", (), (5,), phase="backward"), *(Op("back", (v,), (), phase="backward") for v in (4, 3, 2, 1))]
    program = Program("neighbours", values, tuple(ops))
    executor = _Online(course_of(tables_of(program)), Rules(100, 100))
    for t in range(4):
        executor.step(t)
    alone = executor._score(1)
    executor._leave(2)
    assert executor._score(1) == pytest.approx(6 * alone)  # b, gone, would need a: 1 s + 5 s


def test_the_future_is_not_known():
    orders = [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)]
    gone = [evicted(star((3, 1, 2, 4), (1.0, 2.0, 1.0, 3.0), order), 8) for order in orders]
    assert gone[0] == gone[1] == gone[2] != []


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("share", [*(pytest.param(s, marks=pytest.mark.slow) for s in (0.5, 0.3)), 0.8])
def test_dtr_keeps_within_the_budget(share: float):
    for program in (gpt(6, vocabulary=256), uniform_steps(40)):
        budget = int(share * simulate(program).peak_bytes)
        schedule = dtr(program, budget)
        assert verify(program, schedule) == ()
        assert simulate(program, schedule).peak_bytes <= budget
        assert solve(program, budget).overhead <= solve(program, budget, solver="dtr").overhead


def test_out_of_memory_is_said():
    program = uniform_steps(8)
    assert dtr_runs(course_of(tables_of(program)), 399) is None
    assert simulate(program, dtr(program, 1)).peak_bytes < simulate(program).peak_bytes


def test_nothing_leaves_where_everything_fits():
    program = uniform_steps(8)
    assert dtr(program, simulate(program).peak_bytes).order == tuple(range(len(program.ops)))


def test_where_it_thrashes_it_stops_at_the_deadline():
    program = gpt(12)
    course, plain = course_of(tables_of(program)), simulate(program).peak_bytes
    near_the_floor = int(0.2 * plain)
    begin = clock.now()
    assert dtr_runs(course, near_the_floor, deadline=begin + 0.01) is None
    assert dtr(program, near_the_floor, deadline=begin + 0.01) == Schedule.plain(program)
    assert dtr(program, int(0.7 * plain), deadline=begin + 600) == dtr(program, int(0.7 * plain))


def test_asked_for_by_name_it_respects_the_time_limit():
    with pytest.raises(InfeasibleBudget):
        solve(gpt(6), 0.35, solver="dtr", time_limit_seconds=0.0)
