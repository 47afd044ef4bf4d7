"""How near the lower bound the default plan is, and how long it takes, recording excluded.

The recorded networks of ``strategies.py`` and the 1,001-layer ResNet of ``chen.py``, at 70, 50 and 30 % of the plain
peak: gap (overhead minus lower bound) in percentage points, and the seconds that the plan took. At 70 % it is made
from nothing, within 2 s for every 1,000 ops; at the others a program that has been planned gets another budget, within
half of that; 2 s at least. Seconds are those of the processor, for the time limit, too: what else the machine does
plays no part.
Run: ``python benchmarks/gaps.py [NAME ...]``; takes some minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from autoremat.planner import solve
from autoremat.program import InfeasibleBudget, Program, simulate
from benchmarks.chen import resnet1001
from benchmarks.strategies import gpt24, of_the_zoo, resnet50
from tests.zoo import CASES

GOALS = {0.7: 0.01, 0.5: 0.02, 0.3: 0.05}
"""The largest gap that is wanted, by budget as a share of the plain peak."""

SECONDS_PER_OP = 0.002
LEAST_SECONDS = 2.0


def programs() -> dict[str, Callable[[], Program]]:
    """What is planned, by name."""
    return {
        "GPT-24": gpt24,
        "ResNet-50": resnet50,
        "ResNet-1001": resnet1001,
        **{str(c): of_the_zoo(c) for c in CASES},
    }


def row_of(program: Program, share: float) -> tuple[str, ...]:
    """Overhead, bound, gap and seconds at one budget."""
    limit = max(LEAST_SECONDS, SECONDS_PER_OP * len(program.ops) * (1.0 if share == max(GOALS) else 0.5))
    begin = time.process_time()
    try:
        plan = solve(program, share, time_limit_seconds=limit)
        gap = plan.overhead - plan.lower_bound
        mark = "" if gap <= GOALS[share] else " !"
        found = f"{plan.overhead:.2%}", f"{plan.lower_bound:.2%}", f"{100 * gap:.2f}{mark}"
    except InfeasibleBudget as error:
        found = f"floor {error.floor_bytes / simulate(program).peak_bytes:.0%}", "-", "-"
    return (f"{share:.0%}", *found, f"{time.process_time() - begin:.1f}")


def main(names: list[str]) -> None:
    """Print the table; a gap that is too large is marked."""
    time.monotonic = time.process_time  # the clock of the planner
    console = Console(width=110)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("program", "ops", "budget", "overhead", "bound", "gap", "seconds"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for name, make in programs().items():
        if not names or name in names:
            program = make()
            for share in GOALS:
                table.add_row(name, str(len(program.ops)), *row_of(program, share))
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
