"""A plan of one program is where the planning of a similar one begins."""

from __future__ import annotations

import lzma
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import solve
from autoremat.planner.search.carried import matched_runs
from autoremat.program import InfeasibleBudget, Op, Plan, Program, Value, simulate, verify
from tests.fixed import examples
from tests.planner.random_calls import call_steps
from tests.planner.random_programs import steps

PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "programs"


def of_the_benchmark(name: str) -> Program:
    """One of its programs."""
    return Program.from_json(lzma.decompress((PROGRAMS / f"{name}.json.xz").read_bytes()).decode())


def at_once(program: Program, budget_bytes: int, near: Plan | None = None) -> Plan | None:
    """The first plan of a training."""
    try:
        return solve(program, budget_bytes, first=True, near=near, effort=0.02)
    except InfeasibleBudget:
        return None


@examples(25, everyday=10)
@given(
    program=st.one_of(steps(), call_steps()),
    other=st.one_of(steps(), call_steps()),
    change=st.sampled_from(("seconds", "sizes", "another program")),
    share=st.floats(0.3, 1.0),
    budget_share=st.floats(0.3, 1.0),
)
def test_it_can_be_carried_out_and_is_never_worse(
    program: Program, other: Program, change: str, share: float, budget_share: float
) -> None:
    if change == "seconds":
        other = replace(program, ops=tuple(replace(op, seconds=1.0) for op in program.ops))
    elif change == "sizes":
        other = replace(program, values=tuple(replace(v, nbytes=2 * v.nbytes) for v in program.values))
    near = at_once(other, int(share * simulate(other).peak_bytes))
    if near is None:
        return
    budget = int(budget_share * simulate(program).peak_bytes)
    alone, found = at_once(program, budget), at_once(program, budget, near)
    assert (found is None) == (alone is None)
    if found is not None and alone is not None:
        assert verify(program, found) == ()
        assert found.peak_bytes <= budget
        assert found.overhead <= alone.overhead + 1e-12


def with_ops_between(program: Program, *places: int) -> Program:
    """The program with an op at each of these places, which reads what the op before it makes."""
    values = list(program.values)
    ops = [replace(op, call=2 * op.call if op.call >= 0 else -1) for op in program.ops]
    for place in sorted(places, reverse=True):
        made = next(v for op in reversed(ops[:place]) for v in op.writes if op.phase == "forward")
        values.append(Value(f"between {place}", 64))
        ops.insert(place, Op("between", (made,), (len(values) - 1,), 1e-7, call=ops[place - 1].call + 1))
        values = [_later(v, place) for v in values]
    return replace(program, values=tuple(values), ops=tuple(ops))


def _later(value: Value, place: int) -> Value:
    """The value with the numbers that ops have once there is one more at a place."""
    held, available = (n if n is None or n < place else n + 1 for n in (value.held, value.available))
    return replace(value, held=held, available=available)


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_a_few_ops_more_keep_what_a_long_search_has_found(share: float) -> None:
    program = of_the_benchmark("transformers-bert")
    budget = int(share * simulate(program).peak_bytes)
    given_plan = solve(program, budget, effort=0.3)
    forward = [i for i, op in enumerate(program.ops) if op.phase == "forward" and program.ops[i - 1].call != op.call]
    further = with_ops_between(program, *(forward[len(forward) * k // 8] for k in range(1, 8)))
    assert len(further.ops) == len(program.ops) + 7
    greedy, carried = at_once(further, budget), at_once(further, budget, given_plan)
    assert greedy is not None
    assert carried is not None
    assert verify(further, carried) == ()
    assert carried.overhead <= given_plan.overhead + 0.005 < greedy.overhead
    assert carried.solver == "carried over"


def test_all_reruns_of_a_plan_are_matched_in_its_own_program() -> None:
    program = of_the_benchmark("test-u-net")
    plan = solve(program, 0.5, effort=0.05)
    again = {i for i, n in plan.schedule.runs_of.items() if n > 1}
    assert again
    assert len(matched_runs(program, plan)) >= len({program.ops[i].call for i in again})
