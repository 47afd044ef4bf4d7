"""The page of a plan: figures and tables filled in.

The page draws the pictures from its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from autoremat.program import Program, simulate
from autoremat.program.files import write_text
from autoremat.program.units import format_bytes
from autoremat.show.explanation import Explanation, explanation_of
from autoremat.show.report.data import Point, page_data
from autoremat.show.text import format_seconds

if TYPE_CHECKING:
    from autoremat.planner.frontiers import Frontier
    from autoremat.program import Plan

SCRIPTS: Final = ("page.js", "memory.js", "tier.js", "frontier.js", "modules.js", "values.js")
Beside = Sequence[tuple[str, int, float]]


def write_page(plan: Plan, path: str | Path, *, frontier: Frontier | None = None, beside: Beside = ()) -> Path:
    """Write the page of ``Plan.save_html``; folders on the way are made.

    Raises:
        ModuleNotFoundError: jinja2 is not installed (``pip install 'autoremat[html]'``).
    """
    target = Path(path)
    text = page_of(plan, frontier=frontier, beside=beside)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


def page_of(plan: Plan, *, frontier: Frontier | None = None, beside: Beside = ()) -> str:
    """Render the page as text.

    O(runs + reads).
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the page needs {error.name}; run: pip install 'autoremat[html]'", name=error.name
        ) from None

    e = explanation_of(plan.program, plan)
    points = _points(plan, beside)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"bytes": format_bytes, "seconds": format_seconds, "percent": _percent, "share": _share}
    return environment.from_string(_file("page.html")).render(
        plan=plan,
        points=points,
        timeline=simulate(plan.program, plan),
        reserved=e.reserved_bytes if plan.program.abilities.ordered else None,
        has_frontier=frontier is not None,
        peaks=_peaks(explanation_of(plan.program), e),
        known=_known(plan, e),
        version=_version(),
        style=Markup(_file("page.css")),
        script=Markup("\n".join(map(_file, SCRIPTS))),
        data=Markup(page_data(e, plan, frontier, points)),
    )


def _points(plan: Plan, beside: Beside) -> list[Point]:
    """Order the points: the plan, then by rising peak, none twice."""
    marks = [*((p, "classic") for p in beside), *((p, "candidate") for p in plan.candidates)]
    found = dict.fromkeys(Point(*mark, group) for mark, group in marks)
    return [
        Point(plan.solver, plan.peak_bytes, plan.overhead, "chosen"),
        *sorted(found, key=lambda p: (p.peak_bytes, p.overhead, p.name)),
    ]


def _peaks(plain: Explanation, planned: Explanation) -> list[tuple[str, int, int]]:
    """List ``(category, bytes at the plain peak, bytes at the planned)``.

    The columns add up to the peaks.
    """
    both = plain.categories | planned.categories
    names = sorted(both, key=lambda name: -plain.categories.get(name, 0))
    return [(name, plain.categories.get(name, 0), planned.categories.get(name, 0)) for name in names]


def _known(plan: Plan, e: Explanation) -> list[tuple[str, str, str]]:
    """List ``(what, how, kind)`` of every figure.

    The kind is ``exact``, ``measured``, ``estimated`` or ``given``.
    """
    program = plan.program
    scratch = sum(op.scratch_bytes > 0 for op in program.ops)
    return [
        ("Operators and bytes of values", *_RECORDED.get(program.recorded, _RECORDED[""])),
        ("Seconds of operators", *_timed(program)),
        (
            "Scratch inside of kernels",
            f"Known of {scratch} of {len(program.ops)} ops. It is measured with the seconds; where it is not, it "
            "counts as nothing, and the real peak may be higher by what a kernel takes for itself.",
            "measured" if scratch and program.timing == "measured" else "given" if scratch else "not known",
        ),
        ("Both peaks, and what fills them", "Added up from these bytes, run by run.", "computed"),
        ("Reserved", "The rules of torch's allocator for CUDA, run by run, on an empty device.", "computed"),
        ("Extra time", _extra(plan), "computed"),
        *_link(program),
        ("Lower bound", f"Proven for these bytes and seconds: {_bounds(plan)}.", "proven"),
        (
            "What really happens in training",
            "Not on this page, which is made from the plan alone; autoremat.stats(model) has the measured peak.",
            "not known",
        ),
    ]  # fmt: skip


_RECORDED: Final = {
    "fake": ("Recorded on fake tensors: the operators that ran, the sizes that PyTorch gives them.", "exact"),
    "real": ("Recorded on real tensors, while they were computed.", "exact"),
    "": ("Taken from a file or made by hand.", "given"),
}


def _timed(program: Program) -> tuple[str, str]:
    """Say how the seconds are known, and of which kind they are."""
    text, kind = _TIMED.get(program.timing, _TIMED["given"])
    share = program.measured_share
    if kind == "given" or share in (0.0, 1.0):
        return text, kind
    return f"{text} Timed, now or before: {_percent(share)} of them; the rest is estimated.", kind


_TIMED: Final = {
    "measured": ("Each distinct operator was run, alone, on the device.", "measured"),
    "estimated": ("From floating-point operations and bytes; nothing was run.", "estimated"),
    "given": ("Taken from a file or made by hand.", "given"),
}


def _extra(plan: Plan) -> str:
    if plan.schedule.offloads:
        return "The seconds of all further runs, and of waiting for copies, added up."
    return "The seconds of all further runs, added up."


def _link(program: Program) -> list[tuple[str, str, str]]:
    """Say how fast the link is taken to be."""
    link = program.link
    if link is None:
        return []
    out, back = (format_bytes(int(rate)) for rate in (link.out_bytes_per_second, link.in_bytes_per_second))
    rates = f"{out} a second out, {back} in"
    how = f"{link.name or 'The tier'}: {rates}. A slower one makes the step longer, but never takes more memory."
    return [("The link to the tier", how, "measured" if link.name else "given")]


def _bounds(plan: Plan) -> str:
    text = f"no schedule within this budget takes less than {_percent(plan.lower_bound)} extra time"
    least = plan.floor_lower_bound_bytes
    return f"{text}, and none has a peak below {format_bytes(least)}" if least else text


def _percent(share: float) -> str:
    return f"{share:+.1%}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "all"


def _file(name: str) -> str:
    return (files("autoremat.show.report") / "page" / name).read_text(encoding="utf-8")


def _version() -> str:
    try:
        return version("autoremat")
    except PackageNotFoundError:
        return ""
