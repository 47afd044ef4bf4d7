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


@dataclass(frozen=True)
class _Look:
    """A plan, as Inductor would run it.

    Attributes:
        plan: as it was made.
        program: that it was made for, without what was added to it.
        halves: the two graphs.
        found: Inductor's schedule of them.
    """

    plan: Plan
    program: Program
    halves: Halves
    found: DrySchedule


def fit(
    reading: Reading,
    budget_bytes: int,
    solve: Callable[[Program, int], Plan],
    split: Callable[[Schedule], Halves],
    dry: Callable[[Halves], DrySchedule],
    margin_bytes: int = 0,
) -> Fitted:
    """The first plan whose schedule, as Inductor makes it, stays within the budget.

    Every schedule teaches what operators take as Inductor lays out their tensors. Where that is less than was thought,
    what fits is planned once more: there may be a cheaper plan.

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

    def look(plan: Plan, program: Program) -> _Look:
        halves = split(plan.schedule)
        return _Look(plan, program, halves, dry(halves))

    within, best, tries = budget_bytes - margin_bytes, None, 0
    known = program = reading.program
    while tries < MOST_TRIES:
        plan = _within(solve, program, within)
        if plan is None and tries:
            break
        seen, before, tries = look(plan or _lowest(program, solve), known), known, tries + 1
        known = _as_laid_out(known, seen.found)
        if seen.found.peak_bytes <= within:
            best = _cheaper(best, seen)
            if not seen.plan.overhead or not _takes_less(known, before):
                break
            program = known
        else:
            program = _with_excess(known, seen.plan.schedule, seen.found, within)
    if best is None:
        best = _lowest_look(reading, solve, look)
        tries += 2
    if best.found.peak_bytes > within:
        raise _infeasible(best, budget_bytes, margin_bytes)
    return Fitted(_as_read(best.plan, best.program, budget_bytes), best.halves, best.found.peak_bytes, tries)


def _lowest_look(
    reading: Reading, solve: Callable[[Program, int], Plan], look: Callable[[Plan, Program], _Look]
) -> _Look:
    """The plan of the program's floor with the lowest peak, as Inductor would run it.

    Neither a budget nor anything that is measured anew has a say in it, so that what is named as the floor once is
    accepted as a budget, in another process as well.
    """
    program = reading.program
    seen = look(_lowest_by_formula(reading, program, solve), program)
    known = _as_laid_out(program, seen.found)
    again = look(_lowest_by_formula(reading, known, solve), known)
    return min(seen, again, key=lambda s: s.found.peak_bytes)


def _lowest_by_formula(reading: Reading, program: Program, solve: Callable[[Program, int], Plan]) -> Plan:
    """The plan with the lowest peak, found without looking at measured seconds, and then told in these."""
    plan = _lowest(reading.by_formula(program), solve)
    overhead = plan.schedule.extra_seconds(program) / (program.seconds or 1.0)
    return replace(plan, program=program, overhead=overhead, lower_bound=0.0)


def _infeasible(lowest: _Look, budget_bytes: int, margin_bytes: int) -> InfeasibleBudget:
    floor, at = lowest.found.peak_bytes + margin_bytes, lowest.found.at_peak
    program = lowest.program
    names = ", ".join(dict.fromkeys(program.ops[i].name for i in at.ops)) if at is not None else ""
    return InfeasibleBudget(
        f"no plan of {program.name!r} stays within {format_bytes(budget_bytes)} ({budget_bytes} bytes) once "
        f"Inductor has fused it; the smallest known peak of the compiled step (the floor) is {format_bytes(floor)} "
        f"({floor} bytes), in the kernel of {names or 'an input'}; without fusing it is {lowest.plan.peak_bytes}. Give "
        f"a budget of at least {floor} bytes, or make the step smaller (a smaller batch, shorter sequences).",
        budget_bytes=budget_bytes,
        floor_bytes=floor,
        peak_op=names.partition(",")[0],
    )


def _within(solve: Callable[[Program, int], Plan], program: Program, budget_bytes: int) -> Plan | None:
    """A plan within a budget; None where there is none."""
    try:
        return solve(program, budget_bytes)
    except InfeasibleBudget:
        return None


def _cheaper(known: _Look | None, seen: _Look) -> _Look:
    """The one whose further runs take less, as the later one's program has it."""
    if known is None:
        return seen
    return min(known, seen, key=lambda s: s.plan.schedule.extra_seconds(seen.program))


def _as_laid_out(program: Program, found: DrySchedule) -> Program:
    """The program with what its operators take on tensors as Inductor lays them out."""
    ops = list(program.ops)
    for i, cost in found.costs.items():
        ops[i] = replace(ops[i], scratch_bytes=cost.scratch_bytes, seconds=cost.seconds)
    return replace(program, ops=tuple(ops))


def _takes_less(program: Program, before: Program) -> bool:
    """Whether some operator takes less scratch than was thought."""
    return any(a.scratch_bytes < b.scratch_bytes for a, b in zip(program.ops, before.ops, strict=True))


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
