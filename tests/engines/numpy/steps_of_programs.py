"""Functions for the ops of any program: numpy calls with their reads, writes, sizes and scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from autoremat.engines.numpy import Call, carry_out
from autoremat.engines.numpy.engine import Array
from autoremat.program import Op, Plan, Program, Schedule, simulate

SCALE = 64
"""numpy allocates at least a byte; the random programs have values of none."""


def scaled(program: Program) -> Program:
    """The program with sizes that numpy can have."""
    values = tuple(replace(v, nbytes=SCALE * (v.nbytes + 1)) for v in program.values)
    ops = tuple(replace(op, scratch_bytes=SCALE * op.scratch_bytes) for op in program.ops)
    return Program(program.name, values, ops)


def calls_of(program: Program, look: Callable[[], None]) -> list[Call]:
    """Functions with the reads, writes, sizes and scratch of a program's ops; every byte read decides every result."""
    return [_call(program, i, op, look) for i, op in enumerate(program.ops)]


def _call(program: Program, i: int, op: Op, look: Callable[[], None]) -> Call:
    names, sizes = [v.id for v in program.values], [v.nbytes for v in program.values]
    taken = {new: op.reads.index(old) for new, old in op.in_place}

    def fn(*given: Array) -> Sequence[Array]:
        mixed = sum(int(a.astype(np.int64) @ np.arange(1, a.size + 1)) * (k + 1) for k, a in enumerate(given)) + i
        scratch = np.empty(op.scratch_bytes, np.uint8) if op.scratch_bytes else None
        made = []
        for w in op.writes:
            out = given[taken[w]] if w in taken else np.empty(sizes[w], np.uint8)
            out[:] = (np.arange(out.size) * 31 + mixed * 7 + w) % 251
            made.append(out)
        look()
        del scratch
        return made

    return Call(
        op.name, fn, tuple(names[r] for r in op.reads), tuple(names[w] for w in op.writes), op.phase, op.once,
        tuple((names[new], names[old]) for new, old in op.in_place), op.seconds,
    )  # fmt: skip


def inputs_of(program: Program) -> dict[str, Array]:
    return {v.id: (np.arange(v.nbytes) % 7).astype(np.uint8) for v in program.values if v.fixed}


def every_result(program: Program) -> dict[str, bytes]:
    """What each op of the plain program makes, by name."""
    found: dict[str, bytes] = {}

    def noted(call: Call) -> Call:
        def fn(*given: Array) -> Sequence[Array]:
            made = call.fn(*given)
            found.update((name, a.tobytes()) for name, a in zip(call.writes, made, strict=True))
            return made

        return replace(call, fn=fn)

    calls = [noted(c) for c in calls_of(program, lambda: None)]
    peak = simulate(program).peak_bytes
    plain = Plan(program, Schedule.plain(program), peak, peak, peak, peak, 0.0, 0.0, "plain")
    carry_out(plain, calls, inputs_of(program))
    return found
