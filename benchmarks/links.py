"""Random programs with offload, carried out by the reference engine over links of every temper, to the last bit.

In every program values stay, are computed again, or move to a slower tier and come back, at random moments. It is
carried out over four links: one that copies when it is told to, one that also spoils the memory that nobody may look
at, one that copies at random moments, and one that copies when it is waited for, where the peak is measured as well.
Every run of every call is compared with plain training.

Run: ``python benchmarks/links.py 10000 --seed 1``. Ends with an error at the first difference; ``--write`` puts the
table into docs/offload.md.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, Phase, given, seed, settings

from autoremat.engines.numpy.tier import AtOnce
from autoremat.program import Program, verify
from tests.engines.numpy.meter import Meter
from tests.engines.numpy.offloads import LINK, assert_same, plan_of, random_moves, results_of
from tests.engines.numpy.steps_of_programs import scaled
from tests.engines.numpy.tiers import AtOnceAndSpoiled, AtRandom, Late
from tests.planner.random_programs import steps

PAGE = Path(__file__).resolve().parents[1] / "docs" / "offload.md"
BEGIN, END = "<!-- benchmarks/links.py -->", "<!-- end of links.py -->"
CHUNK = 500


def look_at(program: Program, dice: random.Random, counts: Counter[str]) -> None:
    """Carry one program out over every link."""
    program = replace(scaled(program), link=LINK)
    schedule = random_moves(program, dice)
    assert verify(program, schedule) == ()
    plan, results = plan_of(program, schedule), results_of(program)
    for tier in (AtOnce(), AtOnceAndSpoiled(), AtRandom(dice.randrange(10**6))):
        assert_same(plan, results, tier)
    with Meter() as meter:
        assert_same(plan, results, Late(), meter.look)
        assert meter.peak_bytes == plan.peak_bytes
    counts["programs"] += 1
    counts["with moves"] += bool(schedule.offloads)
    counts["with moves and reruns"] += bool(schedule.offloads) and len(schedule.order) > len(program.ops)
    counts["moves"] += len(schedule.offloads)
    counts["most moves in one"] = max(counts["most moves in one"], len(schedule.offloads))


def run(n: int, first_seed: int, counts: Counter[str]) -> None:
    """Look at so many programs with moves."""
    chunk = 0
    while counts["with moves"] < n:
        chunk += 1
        dice = random.Random(first_seed * 1_000_003 + chunk)

        @seed(first_seed * 1_000_003 + chunk)
        @settings(
            max_examples=CHUNK, database=None, deadline=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(steps())
        def look(program: Program) -> None:
            look_at(program, dice, counts)  # noqa: B023 - called at once

        look()
        print(f"{counts['with moves']} programs with moves", file=sys.stderr, flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", type=int, nargs="?", default=500, help="with at least one move")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into docs/offload.md")
    asked = parser.parse_args()
    counts = Counter[str]()
    run(asked.programs, asked.seed, counts)
    names = ("programs", "with moves", "with moves and reruns", "moves", "most moves in one")
    head = " | ".join(names)
    text = f"| {head} | different |\n|{' --- |' * 6}\n| {' | '.join(str(counts[n]) for n in names)} | 0 |"
    print(text)
    if asked.write:
        page = PAGE.read_text()
        PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + f"\n\n{text}\n\n" + page[page.index(END) :])


if __name__ == "__main__":
    main()
