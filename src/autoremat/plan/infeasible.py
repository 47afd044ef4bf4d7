"""The error for a budget that no known schedule fits into: what stands in the way, and what to do."""

from __future__ import annotations

from autoremat.plan.budget import format_bytes
from autoremat.program import InfeasibleBudget, Program, Schedule, simulate

_SHOWN = 5


def infeasible(program: Program, budget_bytes: int, lowest: Schedule, *, solver: str) -> InfeasibleBudget:
    """The error, made from the schedule with the lowest known peak."""
    timeline = simulate(program, lowest)
    floor = timeline.peak_bytes
    fill = timeline.resident_at_peak
    largest = tuple((program.label(v), program.values[v].nbytes) for v in fill[:_SHOWN])
    lines = [
        f"no schedule known to solver {solver!r} keeps {program.name or 'the program'!r} within "
        f"{_exact(budget_bytes)}; the smallest known peak (the floor) is {_exact(floor)}.",
        f"That peak stands at {_where(program, timeline.peak_op)}. In memory there: "
        + ", ".join(f"{label} ({format_bytes(nbytes)})" for label, nbytes in largest)
        + _rest(program, fill),
        _advice(program, floor, solver),
    ]
    peak_op = program.ops[timeline.peak_op].name if timeline.peak_op >= 0 else ""
    return InfeasibleBudget(
        "\n".join(lines), budget_bytes=budget_bytes, floor_bytes=floor, peak_op=peak_op, largest=largest
    )


def with_message(error: InfeasibleBudget, message: str) -> InfeasibleBudget:
    """The same error with more to say."""
    return InfeasibleBudget(
        message,
        budget_bytes=error.budget_bytes,
        floor_bytes=error.floor_bytes,
        peak_op=error.peak_op,
        largest=error.largest,
    )


def _exact(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} ({nbytes} bytes)" if nbytes >= 1000 else f"{nbytes} bytes"


def _where(program: Program, index: int) -> str:
    if index < 0:
        return "the beginning of an empty program"
    op = program.ops[index]
    module = f" in {op.module}" if op.module else ""
    source = f" at {op.source}" if op.source else ""
    return f"op {index} ({op.name}, {op.phase}){module}{source}"


def _rest(program: Program, fill: tuple[int, ...]) -> str:
    rest = fill[_SHOWN:]
    total = sum(program.values[v].nbytes for v in rest)
    return f" and {len(rest)} smaller ones ({format_bytes(total)})." if rest else "."


def _advice(program: Program, floor: int, solver: str) -> str:
    fixed = program.fixed_bytes
    advice = [f"Give a budget of at least {floor} bytes, or make the step smaller (a smaller batch, shorter sequences)"]
    if fixed * 2 > floor:
        advice.append(
            f"{format_bytes(fixed)} of it are fixed (parameters, inputs, optimizer state), which no plan can lower"
        )
    if solver != "auto":
        advice.append('solver="auto" may know a smaller schedule')
    return "; ".join(advice) + "."
