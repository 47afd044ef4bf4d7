"""One letter stands for one space of indices in ``program`` and ``planner``; the table is in ``docs/design.md``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import autoremat

ROOT = Path(autoremat.__file__).parent
FILES = sorted(path for room in ("program", "planner") for path in (ROOT / room).rglob("*.py"))
DESIGN = (Path(__file__).parent.parent / "docs" / "design.md").read_text(encoding="utf-8")
SPACES = {
    "a value": (
        "values", "producer", "readers", "hold", "available",
        "until", "keepable", "kept", "starts", "early_readers",
    ),
    "an op": ("ops", "call_begin", "handed_until", "late", "rerunnable", "reads"),
    "a run": ("order", "frees"),
}  # fmt: skip
"""The tables of a program, of the planner's ``Tables`` and of a schedule, by what their index stands for."""
SPACE_OF = {table: space for space, tables in SPACES.items() for table in tables}
OWNERS = {"program", "_program", "folded", "tables", "_tables", "schedule", "plan"}
"""Names of what has these tables; of ``self.ops`` and the like only those of ``Program`` itself are."""


def letters() -> dict[str, str]:
    """The rows of the table, as ``letter -> what it stands for``."""
    rows = re.findall(r"^\| ((?:`[a-z]`(?:, )?)+) \| ([^|]+?) \|", DESIGN, re.M)
    return {letter: space for cell, space in rows for letter in re.findall(r"`([a-z])`", cell)}


def space_of(table: ast.expr) -> str | None:
    """What the index of this table stands for, if it is one of those tables."""
    if isinstance(table, ast.Name):
        return SPACE_OF.get(table.id) if table.id in ("ops", "values", "producer", "readers", "order") else None
    if not isinstance(table, ast.Attribute):
        return None
    owner = table.value.attr if isinstance(table.value, ast.Attribute) else getattr(table.value, "id", "")
    return SPACE_OF.get(table.attr) if owner in OWNERS else None


def indexed(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Tables, each with an index into it: a subscript, or the number that goes with an element."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            yield node.value, node.slice
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Call):
            call, target = node.iter, node.target
            if getattr(call.func, "id", "") == "enumerate" and isinstance(target, ast.Tuple):
                yield call.args[0], target.elts[0]


def wrong_letters(tree: ast.AST) -> list[str]:
    known = letters()
    return [
        f"line {index.lineno}: {index.id} is an index of {ast.unparse(table)}, which is that of {space}"
        for table, index in indexed(tree)
        if isinstance(index, ast.Name) and len(index.id) == 1
        if (space := space_of(table)) and known.get(index.id) != space
    ]


def test_the_table_names_every_space() -> None:
    assert set(SPACES) <= set(letters().values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_letter_indexes_the_tables_of_its_space_alone(path: Path) -> None:
    assert wrong_letters(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line", ["program.ops[v]", "self.program.values[i]", "[p for p, op in enumerate(program.ops)]", "schedule.order[i]"]
)
def test_a_letter_of_another_space_is_found(line: str) -> None:
    assert len(wrong_letters(ast.parse(line))) == 1
