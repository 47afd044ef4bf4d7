"""An explanation in tables: what fills the peak, and what pays nothing.

The peak is told by category, by module and by value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from autoremat.program.units import format_bytes
from autoremat.show.blocks import Block, useless_blocks
from autoremat.show.explanation import Explanation
from autoremat.show.modules import Module
from autoremat.show.page import PLAIN_WIDTH, page_width, table_lines
from autoremat.show.residents import Resident, name_of, op_text
from autoremat.show.text import fold_indices, format_seconds, timing_text

if TYPE_CHECKING:
    from rich.table import Table

_MODULES: Final = 18
_VALUES: Final = 10
_BLOCKS: Final = 5
_BAR: Final = 30
_SMALL: Final = 100
"""Modules with less than a hundredth of what counts are summed up."""
_NUMBERED: Final = re.compile(r"(?:(?<=\s)|^)((?:[^\s.:]+\.)+?)(\d+)(?=[.\s]|$)")


def explanation_text(e: Explanation) -> str:
    """Lay out the explanation in four tables, equal layers folded.

    ``blocks.0-11`` stands for twelve of them.
    """
    sections = (_head(e), _categories(e), _modules(e), _values(e), _useless(e))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(e: Explanation) -> list[str]:
    name = f" of {e.program.name}" if e.program.name else ""
    lines = [f"Peak{name}, {_how(e)}: {format_bytes(e.peak_bytes)}"]
    if e.peak_op >= 0:
        op = e.program.ops[e.peak_op]
        where = "".join(f", {part}" for part in (op.module, _short(op.source)) if part)
        lines.append(f"  it stands at op {e.peak_op} of {len(e.program.ops)}, {op.name} ({op.phase}){where}")
    if e.program.abilities.ordered:
        lines.append(
            f"  for it a caching allocator such as CUDA's reserves {format_bytes(e.reserved_bytes)} of a device"
        )
    lines.append(f"  plain training saves {format_bytes(e.saved_bytes)} for the backward, in {len(e.saved)} values")
    return [*lines, *_planned(e)]


def _how(e: Explanation) -> str:
    if e.plan is None:
        return "trained plainly"
    return f"planned by {e.plan.solver} for {format_bytes(e.plan.budget_bytes)}"


def _planned(e: Explanation) -> list[str]:
    if e.plan is None:
        return []
    runs = sum(a.runs for a in e.savings.again)
    seconds = format_seconds(sum(a.seconds for a in e.savings.again))
    return [
        f"  the plan keeps {format_bytes(e.kept_bytes)}, in {len(e.savings.kept)} values, and runs "
        f"{len(e.savings.again)} ops again, {runs} times: {seconds} ({timing_text(e.program)}), {e.plan.overhead:+.1%}"
    ]


def _categories(e: Explanation) -> list[str]:
    table = _table(("bytes", "share", "filled by", ""), right=2)
    for name, nbytes in e.categories.items():
        share = nbytes / e.peak_bytes if e.peak_bytes else 0.0
        table.add_row(format_bytes(nbytes), f"{share:.1%}", name, "█" * round(_BAR * share))
    return table_lines(table)


# --- By module --------------------------------------------------------------------------------------------------------


def _modules(e: Explanation) -> list[str]:
    if not e.modules.modules:
        return []
    again = e.plan is not None
    sources = again and page_width() >= PLAIN_WIDTH  # else the tree needs the room
    columns = ("at peak", "saved plainly", *(("kept", "runs again", "taking") if again else ()))
    table = _table((*columns, "module", *(("again from",) if sources else ())), right=len(columns))
    for depth, m in _shown(e.modules):
        figures = [_bytes(m.peak_bytes), _bytes(m.saved_bytes)]
        if again:
            runs = (str(m.runs_again), format_seconds(m.seconds_again)) if m.runs_again else ("", "")
            figures += [_bytes(m.kept_bytes), *runs]
        table.add_row(*figures, "  " * depth + (m.name or "the whole step"), *([_sources(e, m)] if sources else []))
    return table_lines(table)


def _shown(root: Module) -> Iterator[tuple[int, Module]]:
    """Cut the tree at the depth that fits; drop small modules.

    Each module comes with its depth.
    """
    trees = [[*_walk(root, root, 0, depth)] for depth in range(1, 9)]
    yield from max((t for t in trees if len(t) <= _MODULES), key=len, default=trees[0])


def _walk(module: Module, root: Module, depth: int, deepest: int) -> Iterator[tuple[int, Module]]:
    yield depth, module
    below = [m for m in module.modules if depth < deepest and _matters(m, root)]
    for m in below:
        yield from _walk(m, root, depth + 1, deepest)


def _matters(m: Module, root: Module) -> bool:
    return m.peak_bytes * _SMALL >= root.peak_bytes > 0 or m.saved_bytes * _SMALL >= root.saved_bytes > 0


def _sources(e: Explanation, m: Module) -> str:
    """Name where reruns start: the largest kept values that they read."""
    values = sorted(m.sources, key=lambda v: -e.program.values[v].nbytes)
    rows = [(0, (name_of(e.program, v),)) for v in values]
    names = list(dict.fromkeys(cells[0] for _, _, cells in _folded(rows)))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# --- By value ---------------------------------------------------------------------------------------------------------


def _values(e: Explanation) -> list[str]:
    table = _table(("bytes", "", "value", "why it is in memory", "read next by"), right=2)
    rows = sorted(_folded((r.nbytes, _cells(e, r)) for r in e.residents), key=lambda row: -row[0])
    for nbytes, times, cells in rows[:_VALUES]:
        table.add_row(format_bytes(nbytes), f"{times} x", *cells)
    if len(rows) > _VALUES:
        rest = rows[_VALUES:]
        table.add_row(format_bytes(sum(n for n, _, _ in rest)), f"{sum(t for _, t, _ in rest)} x", "smaller ones")
    return table_lines(table)


def _cells(e: Explanation, r: Resident) -> tuple[str, str, str]:
    """Fill three columns: the value, its reason, its next readers.

    The first says where it was made, too.
    """
    where = _short(r.source)
    what = " ".join(part for part in (r.name, r.type, f"({where})" if where else "") if part)
    readers = [i for i in r.readers if e.program.ops[i].kind != "ask"]
    reader = op_text(e.program.ops[readers[0]]) if readers else ""
    return what, r.why, reader + (f" and {len(readers) - 1} more" if len(readers) > 1 else "")


def _folded(rows: Iterable[tuple[int, Sequence[str]]]) -> list[tuple[int, int, list[str]]]:
    """Join rows that differ only in the numbers of layers.

    Each is an amount, how many, and cells.
    """
    groups: dict[tuple[int, tuple[str, ...]], list[Sequence[str]]] = {}
    for amount, cells in rows:
        groups.setdefault((amount, tuple(_NUMBERED.sub(r"\1#", c) for c in cells)), []).append(cells)
    return [
        (amount * len(members), len(members), [_joined(column) for column in zip(*members, strict=True)])
        for (amount, _), members in groups.items()
    ]


def _joined(cells: Sequence[str]) -> str:
    """Cells that are alike as one: ``blocks.0.norm`` and ``blocks.1.norm`` are ``blocks.0-1.norm``."""
    numbers = iter(zip(*([int(m[2]) for m in _NUMBERED.finditer(c)] for c in cells), strict=True))
    return _NUMBERED.sub(lambda m: m[1] + fold_indices(next(numbers)), cells[0])


# --- What does not pay ------------------------------------------------------------------------------------------------


def _useless(e: Explanation) -> list[str]:
    if e.plan is not None:
        return []
    least = e.saved_bytes / _SMALL
    blocks = [b for b in useless_blocks(e.blocks) if b.saved_bytes >= least]
    rows = sorted(_folded((b.saved_bytes, _complaint(b)) for b in blocks), key=lambda row: -row[0])
    lines = [f"  {path} {why}" for _, _, (path, why) in rows[:_BLOCKS]]
    if len(rows) > _BLOCKS:
        lines.append(f"  and so for {len(rows) - _BLOCKS} more")
    return ["Checkpointing by hand would not pay here:", *lines] if lines else []


def _complaint(b: Block) -> tuple[str, str]:
    return b.path, b.why_not


def _table(columns: Sequence[str], right: int) -> Table:
    """Lay out a table whose first columns hold figures.

    The others may be folded into several lines.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for k, name in enumerate(columns):
        whole = k < right or name == "module"
        table.add_column(name, justify="right" if k < right else "left", no_wrap=whole, overflow="fold")
    return table


def _bytes(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else ""


def _short(source: str) -> str:
    """Cut a line of code's place down to its file's name."""
    return source.replace("\\", "/").rpartition("/")[2]
