"""Random programs, plain and with autoremat, compared to the last bit: the counts of docs/exactness.md.

Run: ``python benchmarks/fuzz.py 10000 --seed 1``. Prints every failure, shrunk, as Python to paste into a test, then
how many programs had what, and what became of them; ends with an error if anything was not as in plain training.
``--moved``: in every program values move to a slower tier and back, at random moments, and copies happen at random
ones; the table is that of docs/offload.md. ``--write`` puts the table into the page. Ctrl-C ends it early, with the
counts so far.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.progress import Progress

from tests.engines.torch.eager.fuzz.draw import features, measured_scripts, moved_scripts, scripts
from tests.engines.torch.eager.fuzz.examine import Outcome
from tests.engines.torch.eager.fuzz.scripts import Script
from tests.engines.torch.eager.fuzz.search import look_at, smallest_failure

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- benchmarks/fuzz.py -->", "<!-- end of fuzz.py -->"
CHUNK = 100
"""Programs from one seed: the search goes on behind a failure with the next chunk."""
MEASURED = 20
"""One chunk in so many has its peaks measured."""


def run(n: int, first_seed: int, *, moved: bool) -> Iterator[tuple[Script, Outcome]]:
    """Every program of ``n``, and what became of it; failures are shrunk and printed on the way."""
    for chunk in range(-(-n // CHUNK)):
        strategy = moved_scripts if moved else measured_scripts if chunk % MEASURED == MEASURED - 1 else scripts
        found = look_at(strategy, min(CHUNK, n - chunk * CHUNK), first_seed * 1_000_003 + chunk)
        failures = [i for i, (_, outcome) in enumerate(found) if outcome.wrong]
        if failures:
            print(f"FAILURE (seed {first_seed}, chunk {chunk})\n{smallest_failure(found)}\n", flush=True)
            found = found[: failures[0] + 1]  # the rest is shrinking
        yield from found


def table(seen: list[tuple[Counter[str], Outcome]], *, moved: bool) -> Iterator[str]:
    """How many programs had what, and what became of them."""
    columns = {
        "programs": lambda o: True,
        "identical": lambda o: not o.wrong and not o.error,
        "the same error": lambda o: not o.wrong and bool(o.error),
        "wrong": lambda o: bool(o.wrong),
        "operators run again": lambda o: o.reruns > 0,
        "left the path": lambda o: o.deviations > 0,
    }
    if moved:
        columns["values moved"] = lambda o: o.moved > 0
    yield f"| programs with | {' | '.join(columns)} |"
    yield f"| --- |{' --- |' * len(columns)}"
    names = sorted({name for features, _ in seen for name in features})
    for name in [*names, "all"]:
        of = [o for features, o in seen if name == "all" or features[name]]
        yield f"| {name} | {' | '.join(str(sum(map(is_so, of))) for is_so in columns.values())} |"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into its page")
    parser.add_argument("--moved", action="store_true", help="values move to a slower tier and back")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    seen: list[tuple[Counter[str], Outcome]] = []
    with suppress(KeyboardInterrupt), Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("programs", total=asked.programs)
        for script, outcome in run(asked.programs, asked.seed, moved=asked.moved):
            seen.append((features(script), outcome))
            progress.advance(task)
            if len(seen) % CHUNK == 0 and progress.disable:
                print(f"{len(seen)} programs", file=sys.stderr, flush=True)
    text = "\n".join(table(seen, moved=asked.moved))
    print(text)
    if asked.write:
        path = DOCS / ("offload.md" if asked.moved else "exactness.md")
        page = path.read_text()
        path.write_text(page[: page.index(BEGIN) + len(BEGIN)] + f"\n\n{text}\n\n" + page[page.index(END) :])
    if any(outcome.wrong for _, outcome in seen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
