"""A plan in words: its cost, its reruns, its peak."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import log1p
from typing import TYPE_CHECKING, Final, NamedTuple

from autoremat.program import Plan, Program, Timeline, place, simulate
from autoremat.program.units import format_bytes
from autoremat.show.page import table_lines
from autoremat.show.residents import op_text, short_source

if TYPE_CHECKING:
    from autoremat.planner.frontiers import Frontier

__all__ = ["fold_indices", "format_bytes", "format_seconds", "frontier_text", "plan_text", "timing_text"]

_SHOWN: Final = 6
_BAR: Final = 36
_NEARLY_ALL: Final = 0.995
"""A share that is as good as all."""
_LAYER: Final = re.compile(r"^((?:[^\s.]+\.)*?)(\d+)(?=[.\s]|$)")


class _Line(NamedTuple):
    """One line of a table; equal layers are added up.

    The amount decides the place.
    """

    amount: float
    times: int
    name: str


def plan_text(plan: Plan) -> str:
    """Describe the plan in some fifteen lines.

    O(runs + reads), since the schedule is simulated again.

    Layers that repeat are folded: ``blocks.0-11.mlp.0`` stands for that module in all twelve blocks.
    """
    timeline = simulate(plan.program, plan)
    sections = (_costs(plan), _repeats(plan.program, timeline), _peak(plan, timeline), _candidates(plan))
    return "\n".join(line for section in sections for line in section)


def _costs(plan: Plan) -> list[str]:
    estimate = "" if plan.program.abilities.ordered else " (estimate: the engine orders runs)"
    plain = plan.plain_peak_bytes
    least = plan.floor_lower_bound_bytes
    below = f"; no plan can be below {format_bytes(least)}" if least else ""
    timing, seconds = timing_text(plan.program), format_seconds(plan.program.seconds)
    without = f", and memory inside kernels {_counted(plan.program)}" if plan.program.timing == "estimated" else ""
    name = f" for {plan.program.name}" if plan.program.name else ""
    return [
        f"Plan{name} by solver {plan.solver}",
        f"  budget      {format_bytes(plan.budget_bytes):>9}  {_share(plan.budget_bytes, plain)} of the plain peak",
        f"  peak        {format_bytes(plan.peak_bytes):>9}  {_share(plan.peak_bytes, plain)} of the plain peak"
        + estimate,
        *_reserved(plan),
        f"  plain peak  {format_bytes(plain):>9}  with nothing computed again",
        f"  floor       {format_bytes(plan.floor_bytes):>9}  smallest known peak{below}",
        f"  extra time  {plan.overhead:>+9.1%}  no plan within this budget can be below {plan.lower_bound:+.1%}",
        f"  plain step  {seconds:>9}  {timing}{without}",
        *_tier(plan),
        *([f"  stopped     {plan.stopped}"] if plan.stopped else []),
    ]


def _reserved(plan: Plan) -> list[str]:
    """Say what an allocator takes of the device.

    Whoever orders runs has an allocator of its own.
    """
    if not plan.program.abilities.ordered:
        return []
    nbytes = format_bytes(place(plan.program, plan).reserved_bytes)
    return [f"  reserved    {nbytes:>9}  of a device, by a caching allocator such as CUDA's"]


def _tier(plan: Plan) -> list[str]:
    """List what goes to the slower tier, and the waiting."""
    link, timeline = plan.program.link, simulate(plan.program, plan)
    if link is None or not plan.schedule.offloads:
        return []
    sent, most = format_bytes(timeline.sent_bytes), format_bytes(timeline.tier_bytes)
    waited = format_seconds(timeline.waited_seconds)
    where = link.name or "the tier"
    what = f"{len(plan.schedule.offloads)} moves, at most {most} at a time; {waited} of waiting is extra time"
    return [f"  to the tier {sent:>9}  {where}: {what}"]


def timing_text(program: Program) -> str:
    """Say where the seconds come from, or which share does not."""
    share = program.measured_share
    if program.timing == "measured" and share < _NEARLY_ALL:
        return f"measured, but for {1 - share:.0%} of it"
    if program.timing == "estimated" and share > 1 - _NEARLY_ALL:
        return f"estimated, but for {share:.0%} of it, which was measured before"
    return program.timing


def _counted(program: Program) -> str:
    return "counted where they were measured" if program.measured_share else "not counted"


def _repeats(program: Program, timeline: Timeline) -> list[str]:
    if not timeline.repeats:
        return ["Nothing is computed again."]
    runs = sum(n for _, n in timeline.repeats)
    head = (
        f"Computed again: {len(timeline.repeats)} of {len(program.ops)} ops, {runs} further runs, "
        f"{format_seconds(timeline.extra_seconds)}"
    )
    lines = _fold_lines((op_text(program.ops[i]), n, n * program.ops[i].again_seconds) for i, n in timeline.repeats)
    shown = [f"  {format_seconds(x.amount):>9}  {x.times:>4} runs  {x.name}" for x in lines[:_SHOWN]]
    return [head, *shown, *_more(format_seconds(sum(x.amount for x in lines[_SHOWN:])), len(lines) - _SHOWN)]


def _peak(plan: Plan, timeline: Timeline) -> list[str]:
    if timeline.peak_op < 0:
        return []
    program, op = plan.program, plan.program.ops[timeline.peak_op]
    where = ", ".join(part for part in (op.module, short_source(op.source)) if part)
    items = [(program.label(v), 1, float(program.values[v].nbytes)) for v in timeline.resident_at_peak]
    lines = _fold_lines(items)
    shown = [f"  {format_bytes(int(x.amount)):>9}  {x.times:>3} x  {x.name}" for x in lines[:_SHOWN]]
    rest = _more(format_bytes(int(sum(x.amount for x in lines[_SHOWN:]))), len(lines) - _SHOWN)
    again = timeline.peak_op in plan.schedule.order[: timeline.peak_run]
    nbytes = op.again_scratch_bytes if again else op.scratch_bytes
    scratch = f"; {format_bytes(nbytes)} of scratch" if nbytes else ""
    head = f"The peak stands at op {timeline.peak_op}, {op.name} ({op.phase}){scratch}"
    return [head, *([f"  of {where}"] if where else []), "In memory there:", *shown, *rest]


def _candidates(plan: Plan) -> list[str]:
    """List the schedules considered; mark those above the budget.

    They are those beside the plan's.
    """
    if not plan.candidates:
        return []
    width = max(len(name) for name, _, _ in plan.candidates)
    return ["Other schedules that were looked at:"] + [
        f"  {name:<{width}}  {overhead:>+7.1%}  peak {format_bytes(peak):>9}"
        + ("  above the budget" if peak > plan.budget_bytes else "")
        for name, peak, overhead in plan.candidates
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "all"


def _more(amount: str, count: int) -> list[str]:
    return [f"  {amount:>9}  in {count} more"] if count > 0 else []


def format_seconds(seconds: float) -> str:
    """Write a duration for people: ``1.25 s``, ``12.1 ms``, ``350 us``."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    if seconds >= 0.9995e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us"


def _fold_lines(items: Iterable[tuple[str, int, float]]) -> list[_Line]:
    """``(path, count, amount)`` with repeated layers added up, the largest amount first."""
    groups: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    for path, count, amount in items:
        prefix, index, suffix = _split(path)
        groups.setdefault((prefix, suffix), []).append((index, count, amount))
    lines = [
        _Line(
            sum(amount for _, _, amount in members),
            sum(count for _, count, _ in members),
            prefix + fold_indices(i for i, _, _ in members if i >= 0) + suffix,
        )
        for (prefix, suffix), members in groups.items()
    ]
    return sorted(lines, key=lambda x: (-x.amount, x.name))


def _split(path: str) -> tuple[str, int, str]:
    """Split a path around its first number.

    ``blocks.3.mlp.0`` is ``("blocks.", 3, ".mlp.0")``; the number is -1 where there is none.
    """
    match = _LAYER.match(path)
    if match is None:
        return path, -1, ""
    return match.group(1), int(match.group(2)), path[match.end() :]


def fold_indices(indices: Iterable[int]) -> str:
    """Numbers with runs folded.

    Example:
        >>> fold_indices([3, 0, 1, 2, 7, 2])
        '0-3,7'
    """
    spans: list[list[int]] = []
    for i in sorted(set(indices)):
        if spans and spans[-1][1] == i - 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def frontier_text(front: Frontier) -> str:
    """Lay out a frontier as a table, a line per budget.

    Each has peak, extra time, lower bound and a logarithmic bar of the two; with a link, in place of the bar, the bytes
    that go to the tier over the step, the most there at a time, and the waiting.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("budget", "of plain", "peak", "extra time", "none below", *(_TRAFFIC if _has_link(front) else ())):
        table.add_column(name, justify="right", no_wrap=True)
    if not _has_link(front):
        table.add_column("█ cannot be avoided, ░ perhaps can", no_wrap=True)
    most = max(p.overhead for p in front.points) or 1.0
    for p, timeline in zip(front.points, front.timelines, strict=True):
        share = _share(p.budget_bytes, front.plain_peak_bytes)
        sizes = format_bytes(p.budget_bytes), share, format_bytes(p.peak_bytes)
        rest = _traffic(timeline) if _has_link(front) else (_bar(p, most),)
        table.add_row(*sizes, f"{p.overhead:+.1%}", f"{p.lower_bound:+.1%}", *rest)
    name = f" of {front.program.name}" if front.program.name else ""
    head = (
        f"Frontier{name}: floor {format_bytes(front.floor_bytes)}, plain peak {format_bytes(front.plain_peak_bytes)}; "
        f"seconds are {timing_text(front.program)}"
    )
    return "\n".join([head, *table_lines(table)])


_TRAFFIC: Final = ("to the tier", "most in it", "waiting")


def _has_link(front: Frontier) -> bool:
    return front.program.link is not None


def _traffic(timeline: Timeline) -> tuple[str, str, str]:
    waited = format_seconds(timeline.waited_seconds)
    return format_bytes(timeline.sent_bytes), format_bytes(timeline.tier_bytes), waited


def _bar(plan: Plan, most: float) -> str:
    """Draw the overhead as a bar; ``most`` fills the whole width."""
    sure, all_of_it = (round(_BAR * log1p(100 * x) / log1p(100 * most)) for x in (plan.lower_bound, plan.overhead))
    return "█" * sure + "░" * (all_of_it - sure)
