"""A plan that fits once Inductor has fused and ordered it: a closed loop around its own schedule.

Fusing lets memory live longer than the program says: two kernels become one, and what either reads is there for both.
Where Inductor's schedule goes beyond the budget, the op that stands there is given the difference as scratch, and the
program is planned again: so less is kept there, and nothing changes elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from autoremat.engines.torch.compiled.dry import DrySchedule, Kernel
from autoremat.engines.torch.compiled.partition import Halves
from autoremat.engines.torch.compiled.reading import TANGENTS, Reading
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, simulate
from autoremat.program.units import format_bytes

MOST_TRIES: Final = 4
"""Plans that are looked at, before the one with the lowest peak."""


@dataclass(frozen=True)
class Fitted:
    """A plan, and what Inductor makes of it.

    Attributes:
        plan: of the program as it was read.
        halves: the two graphs.
        peak_bytes: of Inductor's schedule.
        tries: how many schedules it took.
    """

    plan: Plan
    halves: Halves
    peak_bytes: int
    tries: int


def fit(
    reading: Reading,
    budget_bytes: int,
    solve: Callable[[Program, int], Plan],
    split: Callable[[Schedule], Halves],
    dry: Callable[[Halves], DrySchedule],
    margin_bytes: int = 0,
) -> Fitted:
    """The first plan whose schedule, as Inductor makes it, stays within the budget.

    Args:
        reading: the joint graph.
        budget_bytes: of the peak.
        solve: plans a program.
        split: the graphs of a schedule.
        dry: Inductor's schedule of them.
        margin_bytes: what a step has taken beyond Inductor's own account.

    Raises:
        InfeasibleBudget: not even the plan with the lowest peak stays within; names what its schedule takes.
    """
    within, program, lowest = budget_bytes - margin_bytes, reading.program, -1
    for k in range(MOST_TRIES):
        try:
            plan = solve(program, within)
        except InfeasibleBudget:
            break
        halves = split(plan.schedule)
        found = dry(halves)
        if found.peak_bytes <= within:
            return Fitted(_as_read(plan, reading.program, budget_bytes), halves, found.peak_bytes, k + 1)
        if 0 <= lowest <= found.peak_bytes:
            break
        lowest = found.peak_bytes
        program = _with_excess(program, plan.schedule, found, within)
    return _of_the_floor(reading, budget_bytes, within, solve, split, dry)


def _of_the_floor(
    reading: Reading,
    budget_bytes: int,
    within: int,
    solve: Callable[[Program, int], Plan],
    split: Callable[[Schedule], Halves],
    dry: Callable[[Halves], DrySchedule],
) -> Fitted:
    """The plan of the program's floor, if Inductor's schedule of it fits."""
    plan = _lowest(reading.program, solve)
    halves = split(plan.schedule)
    found = dry(halves)
    if found.peak_bytes <= within:
        return Fitted(replace(plan, budget_bytes=budget_bytes), halves, found.peak_bytes, MOST_TRIES + 1)
    floor = found.peak_bytes + budget_bytes - within
    at = found.at_peak
    names = ", ".join(dict.fromkeys(reading.program.ops[i].name for i in at.ops)) if at is not None else ""
    raise InfeasibleBudget(
        f"no plan of {reading.program.name!r} stays within {format_bytes(budget_bytes)} ({budget_bytes} bytes) once "
        f"Inductor has fused it; the smallest known peak of the compiled step (the floor) is {format_bytes(floor)} "
        f"({floor} bytes), in the kernel of {names or 'an input'}; without fusing it is {plan.peak_bytes} bytes. "
        f"Give a budget of at least {floor} bytes, or make the step smaller (a smaller batch, shorter sequences).",
        budget_bytes=budget_bytes,
        floor_bytes=floor,
        peak_op=names.partition(",")[0],
    )


def _lowest(program: Program, solve: Callable[[Program, int], Plan]) -> Plan:
    """The plan with the lowest peak."""
    try:
        return solve(program, 1)
    except InfeasibleBudget as error:
        return solve(program, error.floor_bytes)


def _as_read(plan: Plan, program: Program, budget_bytes: int) -> Plan:
    """The same plan of the program as it was read, without what was added to its scratch."""
    timeline = simulate(program, plan.schedule)
    plain = simulate(program).peak_bytes
    return replace(
        plan, program=program, budget_bytes=budget_bytes, peak_bytes=timeline.peak_bytes, plain_peak_bytes=plain,
        floor_bytes=min(plan.floor_bytes, timeline.peak_bytes),
    )  # fmt: skip


def _with_excess(program: Program, schedule: Schedule, found: DrySchedule, within: int) -> Program:
    """The program with what Inductor takes beyond it, where that is too much, as scratch of the op there."""
    resident = _resident(program, schedule)
    ops = list(program.ops)
    for kernel in found.kernels:
        taken = found.beside_bytes + kernel.nbytes
        known = _run_of(kernel, resident)
        if taken <= within or known is None:
            continue
        i, is_again, nbytes = known
        more = max(0, taken - nbytes)
        if is_again:
            ops[i] = replace(ops[i], rerun_scratch_bytes=program.ops[i].again_scratch_bytes + more)
        else:
            again = program.ops[i].again_scratch_bytes
            ops[i] = replace(ops[i], scratch_bytes=program.ops[i].scratch_bytes + more, rerun_scratch_bytes=again)
    return replace(program, ops=tuple(ops))


def _run_of(
    kernel: Kernel, resident: dict[tuple[int, bool], tuple[bool, int]]
) -> tuple[int, bool, int] | None:  # fmt: skip
    """The op of a kernel at which most is in memory by the program: the op, whether it runs again, the bytes."""
    known = [(i, *resident[i, kernel.is_late]) for i in kernel.ops if (i, kernel.is_late) in resident]
    return max(known, key=lambda k: k[2], default=None)


def _resident(program: Program, schedule: Schedule) -> dict[tuple[int, bool], tuple[bool, int]]:
    """For every op, in each half in which it runs: whether that is a further run, and the bytes in memory then."""
    during = simulate(program, schedule).resident_bytes
    found: dict[tuple[int, bool], tuple[bool, int]] = {}
    seen, is_late = set[int](), False
    for i, nbytes in zip(schedule.order, during, strict=True):
        is_late |= program.ops[i].name == TANGENTS
        before = found.get((i, is_late), (i in seen, -1))
        found[i, is_late] = before[0], max(before[1], nbytes)
        seen.add(i)
    return found
