"""``Plan``: the schedule chosen for one program and one budget, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recollect.program.model import Program
from recollect.program.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """What to keep and what to compute again, so that the peak of one step stays within the budget.

    Attributes:
        program: the step that was planned.
        schedule: runs and frees; ``schedule.order`` lists op indices in the order they run.
        budget_bytes: the budget asked for.
        peak_bytes: the peak of the schedule.
        plain_peak_bytes: the peak without any recomputation.
        floor_bytes: the smallest budget for which a schedule is known.
        overhead: extra seconds as a fraction of the plain program's seconds.
        lower_bound: an overhead below which no schedule within this budget can go.
        solver: name of the solver whose schedule this is.
        candidates: ``(solver, peak_bytes, overhead)`` of the other schedules that were looked at.
        floor_lower_bound_bytes: no schedule at all has a smaller peak than this; 0 when nothing is known.
    """

    program: Program
    schedule: Schedule
    budget_bytes: int
    peak_bytes: int
    plain_peak_bytes: int
    floor_bytes: int
    overhead: float
    lower_bound: float
    solver: str
    candidates: tuple[tuple[str, int, float], ...] = ()
    floor_lower_bound_bytes: int = 0

    def __str__(self) -> str:
        """The plan in a few lines that a person can read."""
        from recollect.show.text import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from recollect.show.page import as_html

        return as_html(str(self))

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan with its program as JSON text (format ``recollect-plan``, version 1), also to ``path`` if given."""
        from recollect.program.json_format import plan_to_data, write_json

        return write_json(plan_to_data(self), path)

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> Plan:
        """A plan from JSON text, from a file, or from parsed JSON data.

        Raises:
            InvalidProgram: wrong format or version, a missing field, a wrong type, an unknown id.
        """
        from recollect.program.json_format import plan_from_data, read_json

        return plan_from_data(read_json(source))
