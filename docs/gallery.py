"""Makes docs/gallery.md, its pictures, and the table of docs/solvers/index.md: ``python -m docs.gallery``.

Reports on the networks of the tests, recorded on fake tensors with estimated seconds: no step is run, and the figures
are the same on every machine where the time limit of a plan is not hit. Takes some minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import torch
from matplotlib.figure import Figure

from autoremat.engines.torch.eager.dry_run import record
from autoremat.planner import SOLVERS, Frontier, frontier, solve
from autoremat.planner.frontiers import reached
from autoremat.program import InfeasibleBudget, Plan, Program, simulate
from autoremat.show.explanation import explanation_of
from autoremat.show.plots import draw_frontier, draw_memory
from autoremat.show.text import format_bytes
from examples.programs import chain, hourglass, uneven
from tests.zoo import CASES, Case

DOCS = Path(__file__).parent
SHARES = {"XOR MLP": "90%"}
"""Of the plain peak, where it is not 60%: most of this network's memory is weights and gradients, which stay."""

BESIDE = ("segments", "chen", "revolve", "rotor", "dtr")
MOST_OPS = 1000
"""Of larger programs the classics are not drawn: each of them at each budget would take minutes."""

PATIENCE = 60.0
"""Seconds for a plan, and for a frontier."""

HAND_MADE = (
    ("equal layers", chain(16), (1000, 800, 500)),
    ("large layers", uneven([100, 100, 100, 2000] * 3, [1] * 12), (5100, 3100, 2500)),
    ("slow layers", uneven([100] * 12, [1, 1, 1, 20] * 3), (900, 700, 500)),
    ("long skips", hourglass(6), (1000, 800, 700)),
)
"""Title, program, budgets of the table."""

INTRODUCTION = """# Gallery

Reports on seven small networks, each within 60 % of its plain peak (the XOR MLP, which is mostly weights: 90 %);
recorded on fake tensors, from estimated seconds, by `python -m docs.gallery`. The left picture is memory over the step,
plain and planned. The right one is what every budget costs, below it what no plan can reach, and, up to a thousand ops,
what the classics make of it.
"""


def slug(case: Case) -> str:
    """A file name."""
    return case.name.lower().replace(" ", "-")


def program_of(case: Case) -> Program:
    """The recorded step."""
    torch.manual_seed(0)
    return record(case.loss(case.model()), case.inputs(), timing="estimate", name=case.name)


def draw(plan: Plan, front: Frontier, path: Path) -> None:
    """Both pictures side by side."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_memory(left, plan)
    marks = {name: reached(front, name) for name in BESIDE} if len(plan.program.ops) <= MOST_OPS else {}
    draw_frontier(right, front, marks=marks)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def section(case: Case, plan: Plan) -> str:
    """What the gallery says of one network."""
    words = (
        f"{len(plan.program.ops)} ops. Plain peak {format_bytes(plan.plain_peak_bytes)}, planned "
        f"{format_bytes(plan.peak_bytes)} for {plan.overhead:.1%} more time (no plan: below {plan.lower_bound:.1%})."
    )
    picture = f"![{case.name}: memory over the step, and overhead against peak](images/gallery/{slug(case)}.png)"
    reports = (("The plan", str(plan)), ("Where plain training's memory goes", str(explanation_of(plan.program))))
    folded = (f'??? example "{title}"\n\n' + indent(f"```text\n{text}\n```", "    ") for title, text in reports)
    return "\n\n".join((f"## {case.name}", words, picture, *folded)).replace(f"{DOCS.parent}/", "")


def side_by_side() -> Iterator[str]:
    """The lines of the table of solvers."""
    yield "| solver | " + " | ".join(f"{title}: {', '.join(map(str, b))} B" for title, _, b in HAND_MADE) + " |"
    yield "| --- |" + " --- |" * len(HAND_MADE)
    yield "| plain peak | " + " | ".join(f"{simulate(p).peak_bytes} B, {p.seconds:g} s" for _, p, _ in HAND_MADE) + " |"
    for solver in SOLVERS:
        cells = (", ".join(_extra(program, b, solver) for b in budgets) for _, program, budgets in HAND_MADE)
        yield f"| {solver} | " + " | ".join(cells) + " |"


def _extra(program: Program, budget: int, solver: str) -> str:
    try:
        plan = solve(program, budget, solver=solver)
    except InfeasibleBudget:
        return "-"
    return f"{simulate(program, plan).extra_seconds:g}"


def between(page: Path, text: str) -> None:
    """Replace what stands between the marks of this script."""
    begin, end = "<!-- python -m docs.gallery: side by side -->\n", "\n<!-- end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    """Write all of it."""
    between(DOCS / "solvers" / "index.md", "\n".join(side_by_side()))
    sections = []
    for case in CASES:
        program = program_of(case)
        plan = solve(program, SHARES.get(case.name, "60%"), time_limit_seconds=PATIENCE)
        draw(
            plan,
            frontier(program, points=9, time_limit_seconds=PATIENCE),
            DOCS / "images" / "gallery" / f"{slug(case)}.png",
        )
        sections.append(section(case, plan))
        sys.stdout.write(f"{case.name}: {plan.overhead:.2%}, no plan below {plan.lower_bound:.2%}\n")
    (DOCS / "gallery.md").write_text("\n\n".join((INTRODUCTION.strip(), *sections)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
