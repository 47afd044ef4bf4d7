"""What the page of a plan draws, as compact JSON.

Columns of integers, every text once, nothing rounded but seconds.

The page adds up spans by itself, so that every moment of the step can be looked at: 10,000 ops take about a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from autoremat.program import Plan, Program, Schedule
from autoremat.show.explanation import Explanation
from autoremat.show.modules import Module
from autoremat.show.residents import CATEGORIES, name_of, op_text, short_source, type_text
from autoremat.show.spans import spans_of
from autoremat.show.traffic import traffic_of

if TYPE_CHECKING:
    from autoremat.planner.frontiers import Frontier

FATES = ("always there", "kept", "computed again", "not saved", "moved to the tier")
"""What a plan does with a value; the page lists the index."""


@dataclass(frozen=True, slots=True)
class Point:
    """A mark in the frontier: ``group`` is ``chosen``, ``classic`` or ``candidate``."""

    name: str
    peak_bytes: int
    overhead: float
    group: str


@dataclass
class _Texts:
    """Every text once, in the order in which they are first met."""

    places: dict[str, int] = field(default_factory=dict)

    def __call__(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))


def page_data(e: Explanation, plan: Plan, front: Frontier | None, points: Sequence[Point]) -> str:
    """Collect all that the page draws, safe inside a script element.

    O(runs + reads).
    """
    texts, program = _Texts(), plan.program
    data = {
        "categories": CATEGORIES,
        "fates": FATES,
        "budget": plan.budget_bytes,
        "floor": plan.floor_bytes,
        "leastPeak": plan.floor_lower_bound_bytes,
        "plainPeak": plan.plain_peak_bytes,
        "peak": plan.peak_bytes,
        "ops": _ops(program, texts),
        "values": _values(e, texts, {o.value for o in plan.schedule.offloads}),
        "plain": {"spans": _spans(program, Schedule.plain(program))},
        "planned": {"order": _steps(plan.schedule.order), "spans": _spans(program, plan.schedule)},
        "tier": _tier(program, plan.schedule),
        "modules": _module(e.modules),
        "frontier": {
            "points": [(p.name, p.peak_bytes, p.overhead, p.group) for p in points],
            "line": line_of(plan, front),
            "bounds": bounds_of(plan, front),
        },
    }
    data["texts"] = list(texts.places)
    # Inside of a script element only "<" can end it.
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def line_of(plan: Plan, front: Frontier | None) -> list[tuple[int, float]]:
    """List ``(peak, overhead)`` of the best plans by rising peak.

    Without a frontier they are the plan and the plain step.
    """
    known = {(plan.peak_bytes, plan.overhead), (plan.plain_peak_bytes, 0.0)}
    known.update((p.peak_bytes, p.overhead) for p in (front.points if front else ()))
    best: list[tuple[int, float]] = []
    for peak, overhead in sorted(known):
        if not best or overhead < best[-1][1]:
            best.append((peak, overhead))
    return best


def bounds_of(plan: Plan, front: Frontier | None) -> list[tuple[int, float]]:
    """List ``(budget, lower bound)`` by rising budget.

    A bound holds for all smaller budgets, too.
    """
    known = {(plan.budget_bytes, plan.lower_bound)}
    known.update((p.budget_bytes, p.lower_bound) for p in (front.points if front else ()))
    best: list[tuple[int, float]] = []
    for budget, bound in sorted(known, reverse=True):
        best.append((budget, max(bound, best[-1][1] if best else 0.0)))
    return best[::-1]


def _ops(program: Program, texts: _Texts) -> dict[str, Any]:
    return {
        "name": [texts(op.name.removeprefix("aten.").removesuffix(".default")) for op in program.ops],
        "module": [texts(op.module) for op in program.ops],
        "source": [texts(short_source(op.source)) for op in program.ops],
        "backward": [int(op.phase == "backward") for op in program.ops],
        "seconds": [float(f"{op.seconds:.4g}") for op in program.ops],
        "scratch": {i: op.scratch_bytes for i, op in enumerate(program.ops) if op.scratch_bytes},
        "secondsAgain": {
            i: float(f"{op.rerun_seconds:.4g}") for i, op in enumerate(program.ops) if op.rerun_seconds is not None
        },
        "scratchAgain": {
            i: op.rerun_scratch_bytes for i, op in enumerate(program.ops) if op.rerun_scratch_bytes is not None
        },
        "stays": {i: texts(op.why) for i, op in enumerate(program.ops) if op.phase != "backward" and op.once},
    }


def _values(e: Explanation, texts: _Texts, moved: set[int]) -> dict[str, Any]:
    """Lay out values in columns.

    A name of -1 is that of the op which made the value.
    """
    program = e.program
    kept, again = set(e.savings.kept), {a.op: a.runs for a in e.savings.again}
    names = [name_of(program, v) for v in range(len(program.values))]
    return {
        "bytes": [v.nbytes for v in program.values],
        "name": [
            -1 if i >= 0 and name == op_text(program.ops[i]) else texts(name)
            for name, i in zip(names, program.producer, strict=True)
        ],
        "type": [texts(type_text(v.dtype, v.shape)) for v in program.values],
        "made": _steps(program.producer),
        "fate": [_fate(program, v, kept, again, moved) for v in range(len(program.values))],
        "again": {v: again[i] for v, i in enumerate(program.producer) if i in again},
        "kept": _steps(sorted(kept)),
    }


def _fate(program: Program, v: int, kept: set[int], again: dict[int, int], moved: set[int]) -> int:
    if program.values[v].fixed:
        return 0
    if program.producer[v] in again:
        return 2
    return 4 if v in moved else 1 if v in kept else 3


def _tier(program: Program, schedule: Schedule) -> dict[str, Any] | None:
    """Lay out the bytes in the tier, and every copy.

    None where nothing moves.
    """
    traffic = traffic_of(program, schedule)
    if not traffic.copies:
        return None
    return {
        "name": program.link.name if program.link is not None else "",
        "bytes": _steps(traffic.tier_bytes),
        "waits": {p: waited for p, waited in enumerate(traffic.waits) if waited},
        "copies": [(c.value, int(c.way == "in"), c.begin_seconds, c.end_seconds) for c in traffic.copies],
    }


def _spans(program: Program, schedule: Schedule) -> dict[str, Any]:
    """Columns; bytes only where they are not those of the value."""
    spans = spans_of(program, schedule)
    return {
        "value": [s.value for s in spans],
        "begin": _steps(s.begin for s in spans),
        "length": [s.end - s.begin for s in spans],
        "category": [CATEGORIES.index(s.category) for s in spans],
        "bytes": {k: s.nbytes for k, s in enumerate(spans) if s.nbytes != program.values[s.value].nbytes},
    }


def _steps(numbers: Iterable[int]) -> list[int]:
    """Take differences of neighbours: small numbers where these hardly change."""
    return [b - a for a, b in pairwise((0, *numbers))]


def _module(m: Module) -> tuple[Any, ...]:
    below = [_module(b) for b in m.modules]
    return m.name, m.times, m.peak_bytes, m.saved_bytes, m.kept_bytes, m.runs_again, m.seconds_again, below
