"""The error for a budget that no known schedule fits.

It says what stands in the way, and what to do.
"""

from __future__ import annotations

from autoremat.program import InfeasibleBudget, Program, Schedule, simulate
from autoremat.program.units import format_bytes

_SHOWN = 5


def infeasible(program: Program, budget_bytes: int, lowest: Schedule, *, solver: str) -> InfeasibleBudget:
    """Make the error of the schedule with the lowest known peak."""
    timeline = simulate(program, lowest)
    floor = timeline.peak_bytes
    fill = timeline.resident_at_peak
    largest = tuple((program.label(v), program.values[v].nbytes) for v in fill[:_SHOWN])
    moved = ", with values moved to the tier" if lowest.offloads else ""
    lines = [
        f"no schedule known to solver {solver!r} keeps {program.name or 'the program'!r} within "
        f"{_exact(budget_bytes)}; the smallest known peak (the floor) is {_exact(floor)}{moved}.",
        f"That peak stands at {_where(program, timeline.peak_op)}. In memory there: "
        + ", ".join(f"{label} ({format_bytes(nbytes)})" for label, nbytes in largest)
        + _rest(program, fill),
        _advice(program, floor, solver),
    ]
    peak_op = program.ops[timeline.peak_op].name if timeline.peak_op >= 0 else ""
    return InfeasibleBudget(
        "\n".join(lines), budget_bytes=budget_bytes, floor_bytes=floor, peak_op=peak_op, largest=largest
    )


def with_message(
    error: InfeasibleBudget, message: str, arrived: tuple[tuple[str, int], ...] = ()
) -> InfeasibleBudget:  # fmt: skip
    """Make the same error with more to say."""
    return InfeasibleBudget(
        message,
        budget_bytes=error.budget_bytes,
        floor_bytes=error.floor_bytes,
        peak_op=error.peak_op,
        largest=error.largest,
        arrived=arrived or error.arrived,
    )


def with_arrivals(error: InfeasibleBudget, before: Program, now: Program) -> InfeasibleBudget:
    """Add what this step finds and another has not found.

    The other one is of the same training. O(values).
    """
    known, found = _fixed(before), _fixed(now)
    more = {what: (n, nbytes - known.get(what, (0, 0))[1]) for what, (n, nbytes) in found.items()}
    arrived = sorted(((what, nbytes) for what, (_, nbytes) in more.items() if nbytes > 0), key=lambda pair: -pair[1])
    if not arrived:
        return error
    listed = " and ".join(_found(what, more[what][0] - known.get(what, (0, 0))[0], nbytes) for what, nbytes in arrived)
    ask = " autoremat.plan(..., accumulate=True) asks for that beforehand." if arrived[0][0] == "gradients" else ""
    message = (
        f"{error}\nThis step finds {listed} that the first step has not found; with that, the floor is "
        f"{error.floor_bytes:,} bytes.{ask}"
    )
    return with_message(error, message, tuple(arrived))


_WHAT = {"gradient": "gradients", "input": "inputs", "buffer": "buffers", "parameter": "parameters",
         "optimizer": "optimizer state"}  # fmt: skip


def _fixed(program: Program) -> dict[str, tuple[int, int]]:
    """Count, by what they are, the values that stay all along.

    Their bytes are counted, too.
    """
    found: dict[str, tuple[int, int]] = {}
    for value in program.values:
        if value.fixed:
            what = _WHAT.get(value.kind) or value.label or "other memory"
            n, nbytes = found.get(what, (0, 0))
            found[what] = n + 1, nbytes + value.nbytes
    return found


def _found(what: str, n: int, nbytes: int) -> str:
    """Say how many bytes more of something a step finds.

    Such as ``4,096 bytes of gradients (2 parameters)``.
    """
    if what == "gradients":
        return f"{nbytes:,} bytes of gradients ({n} parameter{'s' * (n != 1)})"
    return f"{nbytes:,} bytes of {what}"


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
