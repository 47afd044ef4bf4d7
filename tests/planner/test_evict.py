"""Walks of the evicting executor: exact figures on chains, and what must hold of them on random programs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import solve
from autoremat.planner.search.account import Accountant
from autoremat.planner.search.evict import Rules, course_of, evicting
from autoremat.planner.search.reusing import reuse
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import merge
from autoremat.program import InfeasibleBudget, Program, Schedule, simulate, verify
from tests.fixed import examples
from tests.planner.chains import Builder, chain
from tests.planner.random_programs import steps

BLOCK, INNER = 100, 300


def blocks(n: int) -> Program:
    """n blocks: a boundary of 100 bytes, then three inner values of 300 bytes, all saved, one second each."""
    b = Builder()
    x = b.fixed("x", 0)
    for k in range(n):
        module = f"blocks.{k}"
        for name in ("a", "b", "c"):
            x = b.forward(name, (x,), INNER, 1.0, saves=(x,) if k or name != "a" else (), module=module)
        x = b.forward("out", (x,), BLOCK, 1.0, saves=(x,), module=module)
    return b.backward(f"blocks{n}")


def walk(program: Program, limit: int) -> Schedule | None:
    tables = tables_of(program)
    runs = evicting(course_of(tables), Rules(limit, limit, most_bytes=limit))
    return None if runs is None else Schedule.from_order(program, merge(tables, runs))


@pytest.mark.parametrize(
    ("n", "limit", "peak", "again"),
    [(3, 403, 400, "f0"), (3, 404, 404, ""), (5, 404, 404, "f0 f1 f0"), (5, 504, 500, "f0 f1 f2")],
)
def test_the_walk_of_a_chain(n: int, limit: int, peak: int, again: str):
    program = chain(n)
    schedule = walk(program, limit)
    names = [program.ops[i].name for i in schedule.order]
    late = names[names.index("ones_like") + 1 :]
    assert " ".join(name for name in late if name not in ("unpack", "back")) == again
    assert simulate(program, schedule).peak_bytes == peak


def test_no_walk_below_what_one_op_needs():
    assert walk(chain(3), 399) is None
    assert walk(chain(3), 400) is not None


@pytest.mark.parametrize("n", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
def test_the_floor_of_a_chain_of_blocks_is_what_one_op_of_the_backward_needs(n: int):
    """Boundaries are dropped and made again, block after block: the floor does not grow with the number of blocks."""
    program = blocks(n)
    floor = solve(program, 1.0).floor_bytes
    assert floor == 900  # an inner value, the gradient that comes in and the one that leaves
    assert verify(program, solve(program, floor)) == ()
    with pytest.raises(InfeasibleBudget):
        solve(program, 899)


@examples(60)
@given(program=steps(), share=st.floats(0.0, 1.2), power=st.sampled_from((0.0, 0.5, 1.0)), data=st.data())
def test_a_walk_can_be_carried_out_and_stays_so_when_room_is_spent(program, share, power, data):
    tables, accountant = tables_of(program), Accountant(program)
    limit = int(share * simulate(program).peak_bytes)
    drops = data.draw(st.frozensets(st.sampled_from(tables.droppable)) if tables.droppable else st.just(frozenset()))
    runs = evicting(course_of(tables), Rules(limit, limit, power, drops))
    if runs is None:
        return
    walked = accountant(accountant.order(runs))
    budget = int(walked.peak_bytes * data.draw(st.floats(1.0, 1.5)))
    left, account = reuse(tables, accountant, runs, budget)
    assert set(left) <= set(runs)
    assert account.peak_bytes <= budget
    assert account.extra_seconds <= walked.extra_seconds
    for order in (walked.order, account.order):
        assert verify(program, Schedule.from_order(program, order.tolist())) == ()


@examples(30)
@given(program=steps())
def test_with_all_the_room_nothing_runs_again(program: Program):
    plain = simulate(program).peak_bytes
    tables = tables_of(program)
    assert evicting(course_of(tables), Rules(2 * plain, 2 * plain)) == []
    everything = Rules(2 * plain, 2 * plain, dropped=frozenset(tables.droppable))
    assert reuse(tables, Accountant(program), evicting(course_of(tables), everything), 10 * plain)[0] == []
