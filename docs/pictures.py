"""Draws the three layers of the docs' first page, step by step: ``python -m docs.pictures``.

What is in memory at which step is not drawn by hand: ``simulate`` and ``Schedule`` say so. One SVG for each choice of
what to keep; ``tests/test_docs.py`` checks that the files are what this script makes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from autoremat import Program, Schedule, simulate
from autoremat.program import Once, Op, Value

IMAGES = Path(__file__).parent / "images"
BACKWARD = {"phase": "backward", "once": Once.BACKWARD}
CELL, ROW, LEFT, TOP = 74, 28, 64, 66
GREY, BLUE, ORANGE, RED, INK = "#e8eaed", "#3b75af", "#e58a2b", "#c0392b", "#24292f"


def three_layers() -> Program:
    """X -> A1 -> A2 -> Y and its backward. Every activation is one unit; weights and their gradients are left out."""
    names = ("X", "A1", "A2", "Y", "dY", "dZ2", "dZ1")
    values = tuple(Value(name, 1, fixed=name == "X") for name in names)
    return Program(
        "three layers",
        values,
        (
            Op("A1 = σ(X W1)", (0,), (1,), 1.0),
            Op("A2 = σ(A1 W2)", (1,), (2,), 1.0),
            Op("Y = A2 W3", (2,), (3,), 1.0),
            Op("loss = ΣY", (3,), (), 0.0),
            Op("dY = 1", (), (4,), 0.0, **BACKWARD),
            Op("dW3, dZ2", (2, 4), (5,), 2.0, **BACKWARD),
            Op("dW2, dZ1", (1, 5), (6,), 2.0, **BACKWARD),
            Op("dW1", (0, 6), (), 1.0, **BACKWARD),
        ),
    )


CHOICES = {
    "plain": ("Plain training: keep A1 and A2", (0, 1, 2, 3, 4, 5, 6, 7)),
    "keep-a1": ("Keep A1, compute A2 again", (0, 1, 2, 3, 4, 1, 5, 6, 7)),
    "keep-a2": ("Keep A2, compute A1 again", (0, 1, 2, 3, 4, 5, 0, 6, 7)),
    "keep-neither": ("Keep neither: A1 twice again, A2 once", (0, 1, 2, 3, 4, 0, 1, 5, 0, 6, 7)),
}
"""File name: title, and the ops in the order they run."""


@dataclass(frozen=True)
class Step:
    """One run: the op, whether it is a further run, and for every value in memory the run that made it (-1: input)."""

    op: int
    again: bool
    made_by: dict[int, int]


def steps_of(program: Program, schedule: Schedule) -> list[Step]:
    """What is in memory during each run."""
    made_by = {v: -1 for v, value in enumerate(program.values) if value.fixed}
    steps, seen = list[Step](), set[int]()
    for p, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        made_by |= dict.fromkeys(program.ops[i].writes, p)
        steps.append(Step(i, i in seen, dict(made_by)))
        seen.add(i)
        for v in frees:
            del made_by[v]
    return steps


def picture(title: str, order: tuple[int, ...]) -> str:
    """An SVG: a column for every run, a row for every value, the sum below."""
    program = three_layers()
    schedule = Schedule.from_order(program, order)
    timeline, steps = simulate(program, schedule), steps_of(program, schedule)
    width, height = LEFT + CELL * len(steps) + 12, TOP + ROW * (len(program.values) + 1) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{title}: what is in memory at each step; peak {timeline.peak_bytes}</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        _text(
            12,
            20,
            f"{title}. Peak {timeline.peak_bytes}, layers computed again: {timeline.extra_seconds:g}.",
            bold=True,
        ),
        *(_text(12, _row(v) + 19, value.id, bold=True) for v, value in enumerate(program.values)),
        _text(12, _row(len(program.values)) + 22, "sum"),
    ]
    for p, step in enumerate(steps):
        parts += _column(program, p, step, steps, timeline.resident_bytes[p], timeline.peak_bytes)
    return "\n".join([*parts, *_legend(height), "</svg>", ""])


def _column(program: Program, p: int, step: Step, steps: list[Step], nbytes: int, peak: int) -> list[str]:
    x, op = LEFT + CELL * p, program.ops[step.op]
    first = op.name.partition(" = ")[0]
    color = ORANGE if step.again else INK
    parts = [
        _text(x + CELL / 2, 42, f"{p + 1}", color, middle=True),
        _text(x + CELL / 2, 57, f"{first} again" if step.again else first, color, middle=True),
    ]
    for v in range(len(program.values)):
        here = v in step.made_by
        fill = GREY if not here else ORANGE if step.made_by[v] >= 0 and steps[step.made_by[v]].again else BLUE
        box = f'x="{x + 2}" y="{_row(v) + 2}" width="{CELL - 4}" height="{ROW - 4}"'
        parts.append(f'<rect {box} rx="3" fill="{fill}"/>')
        role = "written" if v in op.writes else "read" if v in op.reads else ""
        if role:
            parts.append(_text(x + CELL / 2, _row(v) + 18, role, "#ffffff", middle=True))
    at_peak = nbytes == peak
    y = _row(len(program.values)) + 22
    return [*parts, _text(x + CELL / 2, y, f"{nbytes}", RED if at_peak else INK, middle=True, bold=at_peak)]


def _legend(height: int) -> list[str]:
    names = ((BLUE, "in memory"), (ORANGE, "made by a further run"), (GREY, "gone, or not there yet"))
    parts = []
    for k, (color, name) in enumerate(names):
        x = LEFT + 170 * k
        parts += [f'<rect x="{x}" y="{height - 22}" width="12" height="12" rx="2" fill="{color}"/>',
                  _text(x + 18, height - 12, name)]  # fmt: skip
    return parts


def _row(v: int) -> int:
    return TOP + ROW * v


def _text(x: float, y: float, words: str, color: str = INK, *, middle: bool = False, bold: bool = False) -> str:
    style = (' text-anchor="middle"' if middle else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" fill="{color}"{style}>{words}</text>'


def pictures() -> dict[str, str]:
    """File names and their text."""
    return {f"three-layers-{name}.svg": picture(*choice) for name, choice in CHOICES.items()}


def main() -> None:
    """Write the files."""
    for name, text in pictures().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"{IMAGES / name}\n")


if __name__ == "__main__":
    main()
