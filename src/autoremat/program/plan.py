"""``Plan``: a schedule for one program and budget, and its promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoremat.program.model import Program
from autoremat.program.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autoremat.planner.frontiers import Frontier


@dataclass(frozen=True)
class Plan:
    """Says what to keep and what to recompute within a budget.

    The peak of one step then stays within that budget.

    Attributes:
        program: the step that was planned.
        schedule: runs and frees; ``schedule.order`` lists op indices in the order they run.
        budget_bytes: the budget asked for.
        peak_bytes: the peak of the schedule.
        plain_peak_bytes: the peak without any recomputation.
        floor_bytes: the smallest budget that is accepted, whoever plans; where the limit of time has cut planning
            short, the smallest that was known by then.
        overhead: extra seconds as a fraction of the plain program's seconds.
        lower_bound: an overhead below which no schedule within this budget can go.
        solver: name of the solver whose schedule this is.
        candidates: ``(solver, peak_bytes, overhead)`` of the other schedules that were looked at.
        floor_lower_bound_bytes: no schedule at all has a smaller peak than this; 0 when nothing is known.
        stopped: when and why the search ended before it was done, as a part of a sentence; "" where it was done.
        plain_seconds: of the step without any recomputation, where some is inside of the program's ops (a loop that
            runs segments again): what ``overhead`` and ``plain_peak_bytes`` stand beside. 0.0: the program itself.
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
    stopped: str = ""
    plain_seconds: float = 0.0

    def __str__(self) -> str:
        """Describe the plan in a few lines for people."""
        from autoremat.show.text import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        """Show the plan in a notebook."""
        from autoremat.show.page import as_html

        return as_html(str(self))

    def save_html(
        self, path: str | Path, *, frontier: Frontier | None = None, beside: Sequence[tuple[str, int, float]] = ()
    ) -> Path:
        """Write one HTML page with all of the plan.

        It opens from disk, in any browser, without a network.

        Memory over the step, plain and planned; extra time against peak; the tree of modules; all values; what was
        measured and what was estimated. About a megabyte for 10,000 ops. Folders on the way are made.

        Args:
            path: of the page.
            frontier: what other budgets cost, to be drawn around the plan.
            beside: ``(solver, peak_bytes, overhead)`` of schedules to mark beside ``candidates``, such as
                ``autoremat.planner.classics_of`` returns.

        Raises:
            ModuleNotFoundError: jinja2 is not installed (``pip install 'autoremat[html]'``).
        """
        from autoremat.show.report.render import write_page

        return write_page(self, path, frontier=frontier, beside=beside)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw memory over the step, plain against planned.

        It is saved where a path is given.

        Args:
            path: of the picture; its suffix decides the format, and folders on the way are made.

        Raises:
            ModuleNotFoundError: matplotlib is not installed (``pip install 'autoremat[plots]'``).
        """
        from autoremat.show.plots import memory_plot

        return memory_plot(self, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Write the plan with its program as JSON text.

        The format is ``autoremat-plan``, version 2. The text is also written to ``path`` if given.
        """
        from autoremat.program.json_format import plan_to_data, write_json

        return write_json(plan_to_data(self), path)

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> Plan:
        """Read a plan from JSON text, a file, or parsed JSON data.

        Raises:
            InvalidProgram: wrong format or version, a missing field, a wrong type, an unknown id.
        """
        from autoremat.program.json_format import plan_from_data, read_json

        return plan_from_data(read_json(source))
