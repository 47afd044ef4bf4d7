"""Random programs in modules, and random schedules of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from autoremat.program import Program, Schedule, simulate
from tests.strategies import SIZES, orders, programs

PATHS = st.sampled_from(("", "stem", "layers.0", "layers.1", "layers.2", "layers.0.a", "layers.1.a", "layers.2.a"))
KINDS = st.sampled_from(("", "parameter", "buffer", "input", "optimizer", "gradient", "activation"))


@st.composite
def placed(draw: st.DrawFn) -> Program:
    """A random program whose ops and fixed values are in modules; in-place ops may change the size."""
    program = draw(programs())
    values = tuple(
        replace(v, module=draw(PATHS), kind=draw(KINDS)) if v.fixed else replace(v, nbytes=draw(SIZES))
        for v in program.values
    )
    return replace(program, values=values, ops=tuple(replace(op, module=draw(PATHS)) for op in program.ops))


@st.composite
def schedules(draw: st.DrawFn, program: Program) -> Schedule:
    """Any order that can run; some values stay longer than they must, so that there are two copies of some."""
    schedule = Schedule.from_order(program, draw(orders(program)))
    frees = tuple(tuple(v for v in f if draw(st.sampled_from((True, True, False)))) for f in schedule.frees)
    return Schedule(schedule.order, frees) if draw(st.booleans()) and can_run(program, frees, schedule) else schedule


def can_run(program: Program, frees: tuple[tuple[int, ...], ...], schedule: Schedule) -> bool:
    try:
        simulate(program, Schedule(schedule.order, frees))
    except ValueError:
        return False
    return True
