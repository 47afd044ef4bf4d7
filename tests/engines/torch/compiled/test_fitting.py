"""The loop around Inductor's schedule: what it learns from one, and what it refuses. A function plays Inductor."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest

from autoremat import InfeasibleBudget, Plan, solve
from autoremat.engines.torch.compiled.dry import DrySchedule, Kernel
from autoremat.engines.torch.compiled.fitting import Fitted, fit
from autoremat.engines.torch.compiled.reading import Reading
from autoremat.engines.torch.operators.costs import Cost
from autoremat.program import Abilities, Once, Op, Program, Schedule, Value, simulate

N = 4


def program(scratch: int) -> Program:
    """A chain whose backward reads all; one op of it is said to take scratch."""
    values = [
        Value("x", 1, fixed=True),
        *(Value(f"v{i}", 10) for i in range(N)),
        *(Value(f"g{i}", 10) for i in range(N)),
    ]
    ops = [Op(f"f{i}", (i,), (i + 1,), 1.0, scratch if i == N - 1 else 0) for i in range(N)]
    for i in range(N):
        before = () if i == 0 else (N + i,)
        ops.append(Op(f"b{i}", (N - i, *before), (N + 1 + i,), 1.0, phase="backward", once=None))
    return Program("chain", tuple(values), tuple(ops), abilities=Abilities("anywhere"))


def fitted(scratch: int, really: int, budget: int, more: int = 0) -> tuple[Fitted, list[int]]:
    """A fit where an operator really takes other scratch than is said, and every kernel so much more."""
    read, looked = program(scratch), []
    true = program(really)

    def dry(schedule: Schedule) -> DrySchedule:
        resident = simulate(true, schedule).resident_bytes
        looked.append(max(resident))
        kernels = [Kernel(n - 1 + more, (i,), is_late=i >= N) for i, n in zip(schedule.order, resident, strict=True)]
        return DrySchedule(tuple(kernels), 1, {N - 1: Cost(1.0, really, (10,), has_run=True)})

    def plan(program: Program, budget: int) -> Plan:
        return solve(program, budget, time_limit_seconds=0.1)

    return fit(reading_of(read), budget, plan, lambda schedule: schedule, dry), looked  # type: ignore[arg-type,return-value]


def reading_of(read: Program, slow: int = 0) -> Reading:
    """A program as it is read where one of its operators is measured to be slow."""
    ops = [replace(op, seconds=9.0) if i == slow else op for i, op in enumerate(read.ops)]
    measured = replace(read, ops=tuple(ops))
    return Reading(Mock(), measured, (), {}, tuple(op.seconds for op in read.ops))


def test_scratch_that_inductor_does_not_take_costs_no_run() -> None:
    """The first plan rests on what was measured elsewhere; the second one on what Inductor calls."""
    plain = simulate(program(0)).peak_bytes
    found, looked = fitted(40, 0, plain)
    assert found.plan.overhead == 0
    assert found.peak_bytes <= plain
    assert found.plan.program.ops[N - 1].scratch_bytes == 0
    assert len(looked) <= 3


def test_a_budget_that_only_fits_without_that_scratch_is_not_refused() -> None:
    found, _ = fitted(1000, 0, 41)
    assert found.peak_bytes <= 41
    assert found.plan.peak_bytes == found.peak_bytes


def test_the_floor_that_is_named_is_accepted() -> None:
    with pytest.raises(InfeasibleBudget) as error:
        fitted(0, 0, 15, more=3)
    floor = error.value.floor_bytes
    assert fitted(0, 0, floor, more=3)[0].peak_bytes <= floor
    with pytest.raises(InfeasibleBudget):
        fitted(0, 0, floor - 1, more=3)


def either_of_two() -> Program:
    """At its floor one of the first two results is let go of, whichever takes less to make again."""
    sizes = {"x": 1, "a": 10, "b": 10, "m": 1, "g": 1}
    values = tuple(Value(name, n, fixed=name == "x") for name, n in sizes.items())
    ops = (
        Op("first", (0,), (1,), 1.0),
        Op("second", (0,), (2,), 1.0),
        Op("middle", (0,), (3,), 50.0, 28),
        Op("both", (1, 2, 3), (4,), 1.0, 20, phase="backward", once=Once.BACKWARD),
    )
    return Program("either", values, ops, abilities=Abilities("anywhere"))


def test_the_floor_is_the_same_whatever_operators_are_measured_to_take() -> None:
    """What it takes once fused depends on which operators run again, and these on what they are measured to take."""

    def plan(program: Program, budget: int) -> Plan:
        return solve(program, budget, time_limit_seconds=0.1)

    def dry(schedule: Schedule) -> DrySchedule:
        return DrySchedule((Kernel(100 + schedule.runs_of[0], (3,), is_late=True),), 1)

    def floor(slow: int) -> int:
        with pytest.raises(InfeasibleBudget) as error:
            fit(reading_of(either_of_two(), slow), 15, plan, lambda schedule: schedule, dry)  # type: ignore[arg-type,return-value]
        return error.value.floor_bytes

    assert floor(slow=0) == floor(slow=1)
