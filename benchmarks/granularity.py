"""What it costs that calls run again from their first op on: op by op against call by call, at three budgets.

For programs whose ops know their call (``Op.call``), as JSON files: the overhead if every op could run again by itself,
if prefixes of calls do, and if only whole calls do.

    python -m benchmarks.granularity step.json ... [--seconds 10]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autoremat import InfeasibleBudget, Program, solve

SHARES = (0.7, 0.5, 0.35)


def op_by_op(program: Program) -> Program:
    """The program without its calls."""
    ops = tuple(replace(op, call=-1) for op in program.ops)
    return replace(program, values=tuple(replace(v, available=None) for v in program.values), ops=ops)


def whole_calls(program: Program) -> Program:
    """The program whose calls hand nothing out before their end."""
    last = {begin: i for i, begin in enumerate(program.call_begin)}
    values = tuple(
        replace(v, available=last[program.call_begin[p]])
        if p >= 0 and program.ops[p].call >= 0 and (v.available is None or v.available >= 0)
        else v
        for p, v in zip(program.producer, program.values, strict=True)
    )
    return replace(program, values=values)


def overhead(program: Program, share: float, seconds: float) -> str:
    """Extra time in percent with its lower bound, or the floor as a share of the plain peak."""
    try:
        plan = solve(program, share, time_limit_seconds=seconds)
    except InfeasibleBudget as error:
        return f"floor {error.floor_bytes / solve(program, 1.0).plain_peak_bytes:.2f}"
    return f"{100 * plan.overhead:.1f} (>= {100 * plan.lower_bound:.1f})"


def rows_of(program: Program, seconds: float) -> list[list[str]]:
    """Name and kind of planning, then a figure for every share."""
    kinds = {"ops": op_by_op(program), "prefixes": program, "whole calls": whole_calls(program)}
    return [[program.name, kind, *(overhead(p, share, seconds) for share in SHARES)] for kind, p in kinds.items()]


def table(programs: Sequence[Program], seconds: float) -> str:
    """All figures as a table."""
    head = ["network", "again", *(f"{share:.0%}" for share in SHARES)]
    rows = [head, *(row for program in programs for row in rows_of(program, seconds))]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table for the files named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each plan")
    options = parser.parse_args(arguments)
    print(table([Program.from_json(path) for path in options.files], options.seconds))


if __name__ == "__main__":
    main()
