"""What torch.utils.checkpoint and autoremat make of steps that are more than arithmetic: for docs/beside-checkpoint.md.

The cases of tests/engines/torch/eager/behaviour.py. Run: ``python benchmarks/behaviour.py``; half a minute.
``--write`` puts the table into the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.section import write_section
from tests.engines.torch.eager.behaviour import CASES, COLUMNS, outcomes_of, row


def report() -> Iterator[str]:
    """The table."""
    yield "| case | " + " | ".join(COLUMNS) + " |"
    yield "| --- " * (len(COLUMNS) + 1) + "|"
    for title in CASES:
        yield row(title, outcomes_of(title))


def main() -> None:
    """Print the table; write it if asked to."""
    torch.set_num_threads(1)
    text = "\n".join(report())
    print(text)
    if "--write" in sys.argv:
        write_section("beside-checkpoint.md", "behaviour.py", text)


if __name__ == "__main__":
    main()
