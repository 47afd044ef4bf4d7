"""``Catalog``: the programs of the benchmark and the best that is known of each, in one folder.

``NAME.json.xz`` is a program; ``schedules/NAME.json.xz`` has the best schedules; ``table.json`` names every program
with five budgets, and for each the extra time of its schedule, the bound, and who found them. A schedule is a list of
pairs, the first and the last op of every stretch of ops that follow one another, and the values that leave after each
run.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from autoremat.planner.search.floor import floor_of
from autoremat.program import Plan, Program, Schedule, simulate
from autoremat.program.files import write_text

SHARES: Final = (0.05, 0.2, 0.4, 0.6, 0.8)
"""Budgets: how far from the smallest known peak (0) to the plain one (1)."""


class NoCatalog(ValueError):
    """There is no benchmark in that folder."""


@dataclass(frozen=True)
class Best:
    """What is known of one program within one budget.

    Attributes:
        budget_bytes: the budget.
        overhead: of the best schedule that is known; None where none is.
        by: who found it.
        bound: no schedule takes less.
        bound_by: who says so.
    """

    budget_bytes: int
    overhead: float | None = None
    by: str = ""
    bound: float = 0.0
    bound_by: str = ""


@dataclass(frozen=True)
class Task:
    """A program of the benchmark.

    Attributes:
        name: of its files.
        title: what people call it.
        kind: chain, unrolled, layered, training graph, recorded, or of the zoo.
        ops: how many ops it has.
        plain_peak_bytes: its peak without any rerun.
        budgets: what is known at each of its five budgets.
    """

    name: str
    title: str
    kind: str
    ops: int
    plain_peak_bytes: int
    budgets: tuple[Best, ...]


@dataclass(frozen=True)
class Catalog:
    """All of it; files of programs and schedules are read when they are asked for."""

    folder: Path
    tasks: tuple[Task, ...]

    @staticmethod
    def at(folder: Path) -> Catalog:
        """The benchmark in a folder; an empty one where the folder has none yet.

        Raises:
            NoCatalog: the folder does not exist.
        """
        if not folder.is_dir():
            raise NoCatalog(
                f"there is no folder {folder}; the benchmark is in benchmarks/programs of autoremat's repository: "
                "run this there, or name its folder with --programs"
            )
        table = folder / "table.json"
        rows = json.loads(table.read_text(encoding="utf-8")) if table.exists() else []
        return Catalog(folder, tuple(_task(row) for row in rows))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the programs."""
        return tuple(task.name for task in self.tasks)

    def program_data(self, name: str) -> Mapping[str, Any]:
        """A program as JSON has it."""
        data: Mapping[str, Any] = json.loads(lzma.decompress((self.folder / f"{name}.json.xz").read_bytes()))
        return data

    def schedules(self, name: str) -> dict[int, Schedule]:
        """The best known schedules of a program, by budget in bytes."""
        path = self._schedules_path(name)
        rows = json.loads(lzma.decompress(path.read_bytes())) if path.exists() else {}
        return {int(budget): Schedule(order_of(row["order"]), row["frees"]) for budget, row in rows.items()}

    def with_program(self, name: str, kind: str, program: Program) -> Catalog:
        """The catalog with one program more, whose file is written."""
        plain, floor = simulate(program).peak_bytes, floor_of(program).nbytes
        budgets = tuple(Best(floor + int(share * (plain - floor))) for share in SHARES)
        _write_xz(self.folder / f"{name}.json.xz", program.to_json())
        task = Task(name, program.name, kind, len(program.ops), plain, budgets)
        return replace(self, tasks=(*self.tasks, task)).written()

    def with_plan(self, name: str, number: int, plan: Plan, by: str) -> Catalog:
        """The catalog with what a plan is better at: a smaller overhead, a larger bound."""
        task = next(task for task in self.tasks if task.name == name)
        best = task.budgets[number]
        better = replace(best, bound=plan.lower_bound, bound_by=by) if plan.lower_bound > best.bound + 1e-9 else best
        if best.overhead is None or plan.overhead < best.overhead - 1e-9:
            better = replace(better, overhead=plan.overhead, by=by)
            self._keep(name, best.budget_bytes, plan.schedule)
        if better == best:
            return self
        budgets = (*task.budgets[:number], better, *task.budgets[number + 1 :])
        tasks = tuple(replace(t, budgets=budgets) if t is task else t for t in self.tasks)
        return replace(self, tasks=tasks).written()

    def written(self) -> Catalog:
        """The same, with its table in the file."""
        lines = ",\n".join(json.dumps(asdict(task)) for task in self.tasks)
        write_text(self.folder / "table.json", f"[\n{lines}\n]\n")
        return self

    def _keep(self, name: str, budget_bytes: int, schedule: Schedule) -> None:
        known = self.schedules(name) | {budget_bytes: schedule}
        rows = {str(b): {"order": stretches_of(s.order), "frees": s.frees} for b, s in sorted(known.items())}
        self._schedules_path(name).parent.mkdir(exist_ok=True)
        _write_xz(self._schedules_path(name), json.dumps(rows, separators=(",", ":")))

    def _schedules_path(self, name: str) -> Path:
        return self.folder / "schedules" / f"{name}.json.xz"


def stretches_of(order: Sequence[int]) -> list[tuple[int, int]]:
    """First and last op of every stretch of ops that follow one another.

    Example:
        >>> stretches_of([0, 1, 2, 1, 2, 3])
        [(0, 2), (1, 3)]
    """
    found: list[tuple[int, int]] = []
    for i in order:
        if found and found[-1][1] == i - 1:
            found[-1] = (found[-1][0], i)
        else:
            found.append((i, i))
    return found


def order_of(stretches: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ops of the stretches one by one."""
    return tuple(i for first, last in stretches for i in range(first, last + 1))


def _task(row: Mapping[str, Any]) -> Task:
    return Task(**{**row, "budgets": tuple(Best(**best) for best in row["budgets"])})


def _write_xz(path: Path, text: str) -> None:
    path.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
