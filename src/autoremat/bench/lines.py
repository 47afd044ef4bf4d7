"""Rows of a contest as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from autoremat.bench.contest import Row

HEAD: Final = f"{'program':34s} {'budget':>7s} {'extra':>9s} {'bound':>9s} {'best':>9s} {'seconds':>7s}"
"""Above the lines."""


def line_of(row: Row) -> str:
    """One row; what the judge refuses is said below it."""
    share = f"{row.best.budget_bytes / row.task.plain_peak_bytes:.1%}"
    bound = max(row.best.bound, row.plan.lower_bound if row.plan else 0.0)
    found = _percent(row.plan.overhead if row.plan else None)
    line = f"{row.task.name:34s} {share:>7s} {found} {_percent(bound)} {_percent(row.best.overhead)} {row.seconds:7.1f}"
    return "\n".join([f"{line}  {row.verdict}", *(f"    {fault}" for fault in row.faults[:3])])


def summary_of(rows: Sequence[Row]) -> str:
    """How many rows had which verdict."""
    counts = Counter(row.verdict for row in rows)
    return f"{len(rows)} budgets: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())


def _percent(share: float | None) -> str:
    return f"{'-':>9s}" if share is None else f"{share:9.3%}"
