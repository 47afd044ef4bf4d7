"""2,000 steps, plain and checkpointed: does anything pile up or drift away? For docs/exactness.md.

Both trainings of tests/engines/torch/eager/long_training.py, each in a process of its own, with a census every 50
steps: live tensors, Python objects and the memory of the process. Run: ``python benchmarks/long_training.py``.
``--write`` draws docs/images/long-training.png and puts the table into the page.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import autoremat
from benchmarks.section import DOCS, write_section
from tests.engines.torch.eager.long_training import STEPS, pair, train

EVERY = 50
SETTLED = 500
"""From this step on things must be level: every kind of input has its plan, and caches are filled."""
COUNTED = {"tensors": "live tensors", "objects": "Python objects", "resident": "process memory, MB"}

Run = tuple[list[Tensor], list[dict[str, int]], int]
"""What is there at the end, the censuses, and how many operators ran again."""


def run(checkpointed: bool) -> Run:
    """One training, in the process that calls this."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # three steps leave the path on purpose
    model = pair()[checkpointed]
    end, counts = train(model, EVERY)
    return end, counts, autoremat.stats(model).reruns if checkpointed else 0


def report(plain: Run, mine: Run) -> Iterator[str]:
    """The section of the page."""
    same = all(torch.equal(a, b) for a, b in zip(plain[0], mine[0], strict=True))
    yield f"| {STEPS:,} steps | plain | autoremat |"
    yield "| --- | --- | --- |"
    yield f"| losses, parameters, buffers, generator at the end | | {'identical' if same else 'NOT identical'} |"
    yield f"| operators run again | 0 | {mine[2]:,} |"
    for key, title in COUNTED.items():
        cells = [change(counts, key) for _, counts, _ in (plain, mine)]
        yield f"| {title}, after {SETTLED} steps and at the end | {cells[0]} | {cells[1]} |"


def change(counts: list[dict[str, int]], key: str) -> str:
    """How many after some steps, and at the end."""
    first, last = counts[SETTLED // EVERY - 1][key], counts[-1][key]
    return f"{first / 1e6:.1f}, {last / 1e6:.1f}" if key == "resident" else f"{first:,}, {last:,}"


def draw(runs: dict[str, Run], path: Path) -> None:
    """A curve per training in a panel per thing counted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(COUNTED)), COUNTED.items(), strict=True):
        scale = 1e6 if key == "resident" else 1
        top = max(c[key] for _, counts, _ in runs.values() for c in counts) / scale
        for name, (_, counts, _) in runs.items():
            steps = range(EVERY, EVERY * len(counts) + 1, EVERY)
            axes.plot(steps, [c[key] / scale for c in counts], label=name)
        axes.set(title=title, xlabel="step", ylim=(0, 1.15 * top))
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run both, print the table; write and draw if asked to."""
    runs: dict[str, Run] = {}
    for name in ("plain", "autoremat"):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            runs[name] = fresh.apply(run, (name == "autoremat",))
    text = "\n".join(report(runs["plain"], runs["autoremat"]))
    print(text)
    if "--write" in sys.argv:
        draw(runs, DOCS / "images" / "long-training.png")
        write_section("exactness.md", "long_training.py", text)


if __name__ == "__main__":
    main()
