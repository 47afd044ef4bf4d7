"""Entries of the table checked by hand: by a recursion on paper, and by adding up intervals."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from autoremat.bench.catalog import Catalog
from autoremat.bench.judge import judged
from autoremat.program import Program, Schedule, verify
from docs.programs import PAGE, page

FOLDER = Path(__file__).parents[2] / "benchmarks" / "programs"
CATALOG = Catalog.at(FOLDER)
TASKS = {task.name: task for task in CATALOG.tasks}
UNIT = 1 << 20


@cache
def again(asked: int, slots: int) -> int:
    """Reruns that hand out x_asked, ..., x_1, in this order, when only x_0 is in memory, with room for so many more."""
    if asked <= 0:
        return 0
    if slots == 0:
        return asked * (asked + 1) // 2
    return min(j + again(asked - j, slots - 1) + again(j - 1, slots) for j in range(1, asked + 1))


@cache
def after_forward(asked: int, slots: int) -> int:
    """The same when the forward, which has to run in any case, may leave what there is room for."""
    if asked <= 0:
        return 0
    if slots == 0:
        return again(asked, 0)
    return min(after_forward(asked - j, slots - 1) + again(j - 1, slots) for j in range(1, asked + 1))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_chain_of_32_takes_what_the_recursion_says(number: int) -> None:
    """The backward of layer k needs x_0, x_k, x_k+1 and two gradients; the last three values are there anyway."""
    best = TASKS["chain-32"].budgets[number]
    slots = best.budget_bytes // UNIT - 5
    assert best.overhead == pytest.approx(after_forward(32 - 3, slots) / 96)


def peak_by_intervals(program: Program, schedule: Schedule) -> int:
    """The most bytes at any run, from the first and the last run of every copy of a value."""
    steps = np.zeros(len(schedule.order) + 1, dtype=np.int64)
    begun: dict[int, int] = {}
    for run, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        for v in program.ops[i].writes:
            assert v not in begun
            begun[v] = run
        for v in frees:
            steps[begun.pop(v)] += program.values[v].nbytes
            steps[run + 1] -= program.values[v].nbytes
    for v, run in begun.items():
        steps[run] += program.values[v].nbytes
    scratch = np.array([program.ops[i].scratch_bytes for i in schedule.order])
    return program.fixed_bytes + int((np.cumsum(steps)[:-1] + scratch).max())


@pytest.mark.parametrize("name", ["recurrence-32", "chain-uneven-32", "graph-layered-35", "layered-100-1"])
def test_entries_take_what_their_intervals_add_up_to(name: str) -> None:
    program = Program.from_json(CATALOG.program_data(name))
    best = TASKS[name].budgets[2]
    schedule = CATALOG.schedules(name)[best.budget_bytes]
    runs = np.bincount(schedule.order)
    extra = sum((n - 1) * program.ops[i].seconds for i, n in enumerate(runs.tolist()))
    assert peak_by_intervals(program, schedule) <= best.budget_bytes
    assert best.overhead == pytest.approx(extra / sum(op.seconds for op in program.ops))


def every(step: int) -> list[str]:
    return [name for k, name in enumerate(TASKS) if k % step == 0 and TASKS[name].ops < 2000]


@pytest.mark.parametrize("name", every(8))
def test_what_the_table_says_is_what_the_judge_says(name: str) -> None:
    data = CATALOG.program_data(name)
    program, schedules = Program.from_json(data), CATALOG.schedules(name)
    for best in TASKS[name].budgets:
        if best.overhead is None:
            continue
        schedule = schedules[best.budget_bytes]
        verdict = judged(data, schedule.order, schedule.frees)
        assert verdict.faults == ()
        assert verdict.peak_bytes <= best.budget_bytes
        assert verdict.overhead == pytest.approx(best.overhead, abs=1e-9)
        assert best.bound <= best.overhead + 1e-9
        assert verify(program, schedule, budget_bytes=best.budget_bytes) == ()


def test_every_program_has_a_file() -> None:
    assert all((FOLDER / f"{name}.json.xz").is_file() for name in TASKS)


def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(CATALOG)
