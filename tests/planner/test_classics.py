"""The classics on chains whose peaks and seconds can be counted by hand."""

from dataclasses import replace

import pytest

from autoremat.planner import solve
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.planner.solvers.every_block import schedule as every_block
from autoremat.planner.solvers.keep_everything import schedule as keep_everything
from autoremat.planner.solvers.segments import boundaries, crossing
from autoremat.planner.solvers.segments import schedule as segments
from autoremat.program import Program, Schedule, simulate, verify
from tests.planner.chains import chain, gpt


def names(program: Program, schedule: Schedule) -> str:
    """The order of runs in short: unpacks left out."""
    return " ".join(program.ops[i].name for i in schedule.order if program.ops[i].name not in ("unpack", "back"))


def test_keep_everything_runs_nothing_again():
    program = chain(5)
    timeline = simulate(program, keep_everything(program, 0))
    assert timeline.extra_seconds == 0
    assert timeline.peak_bytes == 5 * 100 + 2 * 100 + (4 - 100)  # all outputs, a gradient in and out, less the seed's


def test_unroll_runs_a_segment_again_once_and_as_late_as_possible():
    program = chain(4)
    kept = program.ops[1].writes[0]
    order = unroll(program, frozenset({kept}))
    assert names(program, Schedule.from_order(program, order)) == "f0 f1 f2 f3 ones_like f2 f3 f0"


def test_unroll_runs_again_what_was_dropped_again():
    program = chain(3)
    droppable = frozenset(tables_of(program).droppable)
    order = unroll(program, frozenset(), drop_again=(droppable, droppable))
    assert names(program, Schedule.from_order(program, order)) == "f0 f1 f2 ones_like f0 f1 f2 f0 f1 f0"


def test_sqrt_n_segments_on_a_uniform_chain():
    program = chain(16)
    schedule = segments(program, 0)
    assert verify(program, schedule) == ()
    timeline = simulate(program, schedule)
    assert timeline.extra_seconds == 16 - 3  # four segments, whose three boundaries stay
    assert timeline.peak_bytes == 804  # three boundaries, four of the last segment, a gradient, the seed


def test_boundaries_lie_where_few_bytes_cross():
    program = gpt(4, vocabulary=256)
    tables = tables_of(program)
    narrow = {program.ops[i].writes[0] for i in tables.early if program.ops[i].name in ("add", "fc2", "proj")}
    for tapered in (False, True):
        cuts = boundaries(tables, 4, tapered=tapered)
        assert len(cuts) == 3
        assert crossing(tables, cuts) <= narrow


def test_every_block_runs_each_block_again_up_to_its_last_saved_value():
    program = gpt(2, vocabulary=256)
    schedule = every_block(program, 0)
    assert verify(program, schedule) == ()
    forward = [op.name for op in program.ops if op.phase == "forward" and op.module.startswith("blocks.0")]
    again = [program.ops[i] for i, n in schedule.runs_of.items() if n == 2]
    assert [op.name for op in again] == 2 * forward[: forward.index("gelu") + 1]
    assert all(n <= 2 for n in schedule.runs_of.values())


def test_every_block_without_modules_takes_every_op_for_a_block():
    program = chain(6)
    assert (
        simulate(program, every_block(program, 0)).extra_seconds == 1
    )  # all outputs are read by a later block but one


def test_every_block_leaves_ops_outside_of_numbered_modules_alone():
    program = gpt(2, vocabulary=256)
    renamed = replace(program, ops=tuple(replace(op, module=op.module.replace(".", "")) for op in program.ops))
    assert simulate(renamed, every_block(renamed, 0)).extra_seconds == 0


@pytest.mark.parametrize("solver", ["keep-everything", "every-block", "segments", "greedy"])
def test_the_classics_are_there_by_name(solver):
    program = gpt(3, vocabulary=256)
    plan = solve(program, 1.0, solver=solver)
    assert plan.solver == solver
    assert verify(program, plan) == ()


def test_an_unknown_solver_is_refused_with_the_names():
    with pytest.raises(ValueError, match="unknown solver 'magic'; choose one of auto, exact, greedy, chen"):
        solve(chain(3), 1.0, solver="magic")
