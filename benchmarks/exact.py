"""How far ``auto`` is from the optimum that the exact solver proves, and how far the lower bound.

Random graphs of 40 to 100 ops (by seed) and recorded blocks. Run: ``python benchmarks/exact.py``; about ten minutes.
``--quick`` does the smallest ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoremat import Program, simulate, solve
from tests.planner.random_graphs import layered

DATA = Path(__file__).resolve().parents[1] / "tests" / "planner" / "data"
SHARES = (0.1, 0.3, 0.5, 0.8)
"""Budgets: from the floor (0) to the plain peak (1)."""
LIMIT_SECONDS = 120.0


def programs(*, quick: bool) -> Iterator[Program]:
    """What is solved."""
    for n_ops in (40,) if quick else (40, 60, 80, 100):
        for seed in range(3):
            yield layered(seed, n_ops)
    for path in sorted(DATA.glob("*.json"))[: 1 if quick else None]:
        yield Program.from_json(path)


def row(program: Program, share: float) -> str:
    """One program at one budget."""
    plain = simulate(program).peak_bytes
    floor = solve(program, plain).floor_bytes
    budget = floor + int(share * (plain - floor))
    auto = solve(program, budget)
    begin = time.perf_counter()
    best = solve(program, budget, solver="exact", time_limit_seconds=LIMIT_SECONDS)
    seconds = time.perf_counter() - begin
    proven = "proven" if best.lower_bound == best.overhead else f"at least {best.lower_bound:.2%}"
    off = 100 * (auto.overhead - best.overhead)
    return (
        f"{program.name:<16} {len(program.ops):>4} {budget / plain:>7.0%} {auto.lower_bound:>8.2%} "
        f"{best.overhead:>8.2%} {auto.overhead:>8.2%} {off:>8.2f} {seconds:>7.1f}  {proven}"
    )


def main() -> None:
    """Print the table."""
    print(
        f"{'program':<16} {'ops':>4} {'budget':>7} {'bound':>8} {'exact':>8} {'auto':>8} {'auto off':>8} {'seconds':>7}"
    )
    for program in programs(quick="--quick" in sys.argv):
        for share in SHARES:
            print(row(program, share), flush=True)


if __name__ == "__main__":
    main()
