"""``Explanation``: where the peak stands, and what fills it.

It has what is kept and what is computed again, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from autoremat.program import Plan, Program, Schedule, place, simulate
from autoremat.program.files import write_text
from autoremat.show.blocks import Block, blocks_of
from autoremat.show.modules import Module, module_tree
from autoremat.show.residents import CATEGORIES, Resident, residents_at
from autoremat.show.savings import Savings, savings_of


@dataclass(frozen=True)
class Explanation:
    """A step, plain or planned, at the moment of its peak.

    ``print`` it; notebooks show it by themselves.

    Attributes:
        program: the step.
        plan: what was planned for it; None for plain training.
        peak_bytes: the peak that ``simulate`` finds.
        peak_op: index of the op at which it stands; -1 for a step without ops.
        residents: what is in memory there, largest first; their bytes add up to the peak.
        modules: the same along the tree of modules, equal layers folded; the root has the whole peak.
        saved: what plain training saves from the forward for the backward.
        savings: what the schedule keeps of it, and what it computes again.
        blocks: what checkpointing each module by hand would free.
    """

    program: Program
    plan: Plan | None
    peak_bytes: int
    peak_op: int
    residents: tuple[Resident, ...]
    modules: Module
    saved: tuple[int, ...]
    savings: Savings
    blocks: tuple[Block, ...]

    @cached_property
    def categories(self) -> dict[str, int]:
        """Add up the bytes at the peak by category.

        Those without any are left out; the sum is the peak.
        """
        table = dict.fromkeys(CATEGORIES, 0)
        for r in self.residents:
            table[r.category] += r.nbytes
        return {name: nbytes for name, nbytes in table.items() if nbytes}

    @property
    def saved_bytes(self) -> int:
        """What plain training saves from the forward for the backward."""
        return self._bytes_of(self.saved)

    @property
    def kept_bytes(self) -> int:
        """Count what stays from the forward, for the backward and reruns."""
        return self._bytes_of(self.savings.kept)

    @cached_property
    def reserved_bytes(self) -> int:
        """What a caching allocator takes of the device."""
        return place(self.program, self.plan).reserved_bytes

    def _bytes_of(self, values: Sequence[int]) -> int:
        return sum(self.program.values[v].nbytes for v in values)

    def __str__(self) -> str:
        """Tables that fit the terminal."""
        from autoremat.show.explanation_lines import explanation_text

        return explanation_text(self)

    def _repr_html_(self) -> str:
        """Show the explanation in a notebook."""
        from autoremat.show.page import as_html

        return as_html(str(self))

    def to_json(self, path: str | Path | None = None) -> str:
        """Write all figures as JSON text, also to ``path`` if given.

        The format is ``autoremat-explanation``, version 1.
        """
        text = json.dumps(_data(self), indent=1) + "\n"
        if path is not None:
            write_text(path, text)
        return text


def explanation_of(program: Program, plan: Plan | None = None) -> Explanation:
    """Explain the plain program, or a plan for it.

    O((runs + reads) x depth of modules).
    """
    plain = Schedule.plain(program)
    schedule = plain if plan is None else plan.schedule
    timeline = simulate(program, schedule)
    residents = residents_at(program, schedule, timeline.peak_run)
    saved, savings = savings_of(program, plain), savings_of(program, schedule)
    return Explanation(
        program=program,
        plan=plan,
        peak_bytes=timeline.peak_bytes,
        peak_op=timeline.peak_op,
        residents=residents,
        modules=module_tree(program, residents, saved, savings),
        saved=saved.kept,
        savings=savings,
        blocks=blocks_of(program),
    )


def _data(e: Explanation) -> dict[str, Any]:
    """Turn figures into JSON data; values by id, ops by index."""
    return {
        "format": "autoremat-explanation",
        "version": 1,
        "name": e.program.name,
        "timing": e.program.timing,
        "measured_share": e.program.measured_share,
        "solver": e.plan.solver if e.plan else None,
        "budget_bytes": e.plan.budget_bytes if e.plan else None,
        "peak_bytes": e.peak_bytes,
        "reserved_bytes": e.reserved_bytes,
        "peak_op": e.peak_op,
        "saved_bytes": e.saved_bytes,
        "kept_bytes": e.kept_bytes,
        "categories": e.categories,
        "modules": _with_ids(asdict(e.modules), e.program),
        "residents": [_with_ids(asdict(r), e.program) for r in e.residents],
        "again": [_with_ids(asdict(a), e.program) for a in e.savings.again],
        "blocks": [asdict(b) | {"why_not": b.why_not} for b in e.blocks],
    }


def _with_ids(data: dict[str, Any], program: Program) -> dict[str, Any]:
    ids = program.values
    if "value" in data:
        data["value"] = ids[data["value"]].id if data["value"] >= 0 else None
    if "sources" in data:
        data["sources"] = [ids[v].id for v in data["sources"]]
    if "modules" in data:
        data["modules"] = [_with_ids(m, program) for m in data["modules"]]
    return data
