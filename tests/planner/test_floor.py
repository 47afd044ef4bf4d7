"""The floor: whoever plans a step comes to the same one, and has a plan for it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from autoremat.planner import solve
from autoremat.planner.search.floor import Floor
from autoremat.planner.search.pool import Pool
from autoremat.program import InfeasibleBudget, Program, simulate, verify
from tests.planner.layers import layers

DATA = Path(__file__).parent / "data"


def uneven(program: Program, seed: int) -> Program:
    """The program with values of all sizes: there many a choice of a search hangs on a second."""
    dice = random.Random(seed)
    values = tuple(replace(v, nbytes=int(v.nbytes * dice.uniform(0.1, 3))) for v in program.values)
    return replace(program, values=values)


RECORDED = {
    "calls": uneven(layers(12), 0),
    "GPT": uneven(Program.from_json(DATA / "gpt-2-blocks.json"), 1),
    "ResNet": uneven(Program.from_json(DATA / "resnet-2-blocks.json"), 0),
}


def timed_anew(program: Program, seed: int) -> Program:
    """The program as another process may have timed it."""
    dice = random.Random(seed)
    return replace(program, ops=tuple(replace(op, seconds=op.seconds * dice.uniform(0.2, 5)) for op in program.ops))


def floor_of(program: Program) -> int:
    return Floor(program).nbytes


@pytest.mark.parametrize("name", RECORDED)
def test_it_does_not_depend_on_what_operators_take(name: str) -> None:
    program = RECORDED[name]
    floors = {floor_of(program), *(floor_of(timed_anew(program, seed)) for seed in range(3))}
    assert len(floors) == 1


@pytest.mark.parametrize("name", RECORDED)
def test_it_is_a_budget_however_little_time_there_is(name: str) -> None:
    program = RECORDED[name]
    floor = floor_of(timed_anew(program, 7))
    for seconds, first in ((1.0, False), (0.001, True)):
        plan = solve(program, floor, time_limit_seconds=seconds, first=first)
        assert plan.peak_bytes <= floor
        assert plan.floor_bytes == floor
        assert verify(program, plan) == ()
        with pytest.raises(InfeasibleBudget) as caught:
            solve(program, floor - 1, time_limit_seconds=seconds, first=first)
        assert caught.value.floor_bytes == floor


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=(pytest.mark.slow, pytest.mark.guard)) for n in ("calls", "GPT")), "ResNet"]
)
def test_what_a_plan_made_at_once_names_is_a_budget(name: str) -> None:
    program = RECORDED[name]
    floor, plain = floor_of(program), simulate(program).peak_bytes
    for share in (0.02, 0.4):
        plan = solve(replace(program), int(floor + share * (plain - floor)), first=True)
        assert floor <= plan.floor_bytes <= plan.budget_bytes


def test_candidates_on_the_way_have_the_seconds_of_the_program() -> None:
    program = RECORDED["calls"]
    pool = Pool(program)
    for entry in pool._look_for_the_floor():
        candidate = pool._search.recall(entry)
        assert candidate.peak_bytes == entry.peak_bytes
        assert candidate.extra_seconds == pytest.approx(entry.extra_seconds)
    assert floor_of(program) < simulate(program).peak_bytes
