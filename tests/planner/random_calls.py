"""Random programs with their ops grouped into calls, and orders in which calls run again up to some op."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from autoremat.program import INSIDE, Program, Value
from tests.planner.random_programs import literature_steps, recorded_steps


@st.composite
def with_calls(draw: st.DrawFn, programs: st.SearchStrategy[Program]) -> Program:
    """The program with calls of one to four ops, and what each value needs to be handed out."""
    program = draw(programs)
    early = _early(program)
    ops, number = list(program.ops), 0
    position = 0
    while position < early:
        size = draw(st.integers(1, min(4, early - position)))
        alone = size == 1 and draw(st.booleans())
        for i in range(position, position + size):
            scratch = draw(st.sampled_from((0, 0, 0, 3, 11)))
            ops[i] = replace(ops[i], call=-1 if alone else number, scratch_bytes=scratch)
        number += 2
        position += size
    grouped = Program(program.name, program.values, tuple(ops))
    values = tuple(_in_call(draw, grouped, v) for v in range(len(grouped.values)))
    return Program(program.name, values, grouped.ops)


def _early(program: Program) -> int:
    """How many ops come before the backward; of a program that does not say, about half."""
    return next((i for i, op in enumerate(program.ops) if op.phase == "backward"), len(program.ops) // 2)


def _in_call(draw: st.DrawFn, program: Program, v: int) -> Value:
    """The value held for a while by its call, and handed out by one of its ops, or by none."""
    value, made_by = program.values[v], program.producer[v]
    if made_by < 0 or program.ops[made_by].call < 0:
        return value
    last = max(i for i, begin in enumerate(program.call_begin) if begin == program.call_begin[made_by])
    overwritten = [i for i, op in enumerate(program.ops) for _, old in op.in_place if old == v]
    most = min([last + 2, len(program.ops) - 1, *overwritten])
    held = draw(st.sampled_from((None, None, *range(made_by, most + 1))))
    value = replace(value, held=held if value.held is None else value.held)
    if all(i <= last for i in program.readers[v]):
        return replace(value, available=draw(st.sampled_from((None, INSIDE, INSIDE, last))))
    return replace(value, available=draw(st.sampled_from((None, *range(made_by, last + 1)))))


def call_steps(max_ops: int = 10) -> st.SearchStrategy[Program]:
    """Steps of either shape with calls."""
    return with_calls(st.one_of(recorded_steps(3, max_ops), literature_steps(3, max_ops)))
