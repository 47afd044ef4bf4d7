"""Plans that move values, carried out over a link, with what every run makes compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from autoremat.engines.numpy import Call, carry_out
from autoremat.engines.numpy.tier import Array, Tier
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.program import Link, Plan, Program, Schedule, simulate
from tests.engines.numpy.steps_of_programs import calls_of, every_result, inputs_of
from tests.planner.random_offloads import with_random_offloads

LINK = Link(100.0, 200.0, 0.01)


def plan_of(program: Program, schedule: Schedule) -> Plan:
    """A plan that promises what the schedule does."""
    timeline = simulate(program, schedule)
    overhead = timeline.overhead_seconds / program.seconds if program.seconds else 0.0
    peak = timeline.peak_bytes
    return Plan(program, schedule, peak, peak, simulate(program).peak_bytes, peak, overhead, 0.0, "by hand")


def assert_same(
    plan: Plan, results: dict[str, bytes], tier: Tier, look: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """Carry out a plan; every run of every call makes what it makes in plain training."""

    def compared(call: Call) -> Call:
        def fn(*given: Array) -> Sequence[Array]:
            made = call.fn(*given)
            assert [a.tobytes() for a in made] == [results[name] for name in call.writes]
            return made

        return replace(call, fn=fn)

    carry_out(plan, list(map(compared, calls_of(plan.program, look))), inputs_of(plan.program), tier)


def results_of(program: Program) -> dict[str, bytes]:
    return every_result(replace(program, link=None))


def random_moves(program: Program, dice: random.Random) -> Schedule:
    """Values stay, go, or move to the tier and come back at random."""
    base = Schedule.plain(program)
    if dice.random() < 0.7:
        droppable = sorted(tables_of(program).droppable)
        base = Schedule.from_order(program, unroll(program, frozenset(v for v in droppable if dice.random() < 0.5)))
    return with_random_offloads(program, base, dice)
