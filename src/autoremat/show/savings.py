"""What a schedule keeps for later, and what it computes again.

It says how often, from what, and at what cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoremat.program import Program, Schedule


@dataclass(frozen=True, slots=True)
class Again:
    """An op that runs more than once.

    Attributes:
        op: index in ``Program.ops``.
        runs: reruns, the first one not counted.
        seconds: of the reruns together.
        sources: the values kept or there from the start, parameters and buffers apart, that they read.
    """

    op: int
    runs: int
    seconds: float
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Savings:
    """What happens to the values of the forward.

    Attributes:
        kept: the values made by a first run in the forward that the backward, or a rerun, reads as they are; of
            the plain schedule, what plain training saves.
        again: the ops that run more than once, in program order.
    """

    kept: tuple[int, ...]
    again: tuple[Again, ...]


def savings_of(program: Program, schedule: Schedule) -> Savings:
    """Walk through the schedule once. O(runs + reads)."""
    fresh = {v for v, value in enumerate(program.values) if value.fixed}
    kept: set[int] = set()
    runs: dict[int, int] = {}
    sources: dict[int, set[int]] = {}
    for i in schedule.order:
        op = program.ops[i]
        runs[i] = runs.get(i, 0) + 1
        if op.phase == "backward" or runs[i] > 1:
            kept.update(v for v in op.reads if v in fresh and _of_forward(program, v))
        if runs[i] > 1:
            read = (v for v in op.reads if v in fresh and program.values[v].kind not in ("parameter", "buffer"))
            sources.setdefault(i, set()).update(read)
            fresh.difference_update(op.writes)
        else:
            fresh.update(op.writes)
    again = (
        Again(i, n - 1, (n - 1) * program.ops[i].again_seconds, tuple(sorted(sources[i])))
        for i, n in sorted(runs.items())
        if n > 1
    )
    return Savings(tuple(sorted(kept)), tuple(again))


def _of_forward(program: Program, value: int) -> bool:
    made_by = program.producer[value]
    return made_by >= 0 and program.ops[made_by].phase == "forward"
