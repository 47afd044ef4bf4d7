"""The judge of the benchmark: its figures are right, it sees what is wrong, and it knows nobody."""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.bench import judge
from autoremat.bench.judge import judged
from autoremat.planner import solve
from autoremat.program import END, Once, Op, Program, Schedule, Value, simulate
from tests.planner.layers import layers, recurrence, stack
from tests.strategies import orders, programs


def data_of(program: Program) -> dict[str, object]:
    found: dict[str, object] = json.loads(program.to_json())
    return found


PROGRAMS = [stack(6), recurrence(8), layers(5)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_it_counts_what_the_simulator_counts(program: Program) -> None:
    for share in (1.0, 0.9, 0.8):
        plan = solve(program, share, effort=0.05)
        verdict = judged(data_of(program), plan.schedule.order, plan.schedule.frees)
        assert verdict.faults == ()
        assert verdict.peak_bytes == plan.peak_bytes
        assert verdict.overhead == pytest.approx(plan.overhead, abs=1e-12)


@given(st.data())
def test_it_counts_the_same_for_any_order(data: st.DataObject) -> None:
    program = data.draw(programs())
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    verdict = judged(data_of(program), schedule.order, schedule.frees)
    timeline = simulate(program, schedule)
    assert verdict.faults == ()
    assert verdict.peak_bytes == timeline.peak_bytes
    assert verdict.overhead == pytest.approx(timeline.extra_seconds / (program.seconds or 1.0), abs=1e-9)


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(judge.__file__).read_text(encoding="utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not {m for m in modules if (m or "").startswith("autoremat")}


A = Program(
    "small",
    (Value("x", 4, fixed=True), Value("a", 8), Value("b", 2, held=2), Value("y", 4, held=END)),
    (Op("f", (0,), (1,), 1.0), Op("g", (1,), (2,), 2.0, once=Once.GIVEN, note="random"), Op("h", (1, 2), (3,), 1.0)),
)


@pytest.mark.parametrize(
    ("order", "frees", "fault"),
    [
        ((0, 1, 2), ((), (1,), (2,)), "reads a, which is not in memory"),
        ((0, 1, 1, 2), ((), (), (), (1, 2)), "op 1 must not run again"),
        ((0, 1), ((), (1, 2)), "op 2 never runs"),
        ((1, 0, 2), ((), (), (1, 2)), "runs first after a later one"),
        ((0, 1, 2), ((), (2,), (1,)), "b leaves, but it is held until op 2"),
        ((0, 1, 2), ((0,), (), (1, 2)), "x leaves, but it stays to the end"),
        ((0, 1, 2), ((1,), (1,), (2,)), "a leaves, but it is not in memory"),
    ],
)
def test_it_names_what_cannot_be(order: tuple[int, ...], frees: tuple[tuple[int, ...], ...], fault: str) -> None:
    assert any(fault in found for found in judged(data_of(A), order, frees).faults)


def test_random_schedules_with_a_value_left_too_early_are_refused() -> None:
    dice = random.Random(1)
    program = stack(6)
    plan = solve(program, 0.8, effort=0.05)
    frees = list(plan.schedule.frees)
    for _ in range(20):
        k = dice.randrange(4, len(frees) - 4)
        made = program.ops[plan.schedule.order[k]].writes
        broken = [*frees]
        broken[k] = (*frees[k], *(v for v in made if v not in frees[k]))
        verdict = judged(data_of(program), plan.schedule.order, broken)
        assert verdict.faults or broken[k] == frees[k]
