"""Tables as wide as the terminal, and text as HTML, by rich."""

from __future__ import annotations

import shutil
import sys
from io import StringIO
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.table import Table

PLAIN_WIDTH: Final = 110
"""Columns where the output is not a terminal."""
_PAGE: Final = '<pre style="overflow-x:auto;line-height:1.3;font-family:monospace">{code}</pre>'


def page_width() -> int:
    """Measure the terminal's columns, at least 60 and at most 160."""
    if not sys.stdout.isatty():
        return PLAIN_WIDTH
    return min(max(shutil.get_terminal_size().columns, 60), 160)


def table_lines(table: Table) -> list[str]:
    """Print the table as lines of plain text, without empty ones."""
    from rich.console import Console

    page = StringIO()
    Console(width=page_width(), color_system=None, file=page).print(table)
    return [line.rstrip() for line in page.getvalue().splitlines() if line.strip()]


def as_html(text: str) -> str:
    """Turn the text into HTML for notebooks, figures coloured."""
    from rich.console import Console

    width = max(map(len, text.splitlines()), default=1)
    console = Console(record=True, width=width + 1, file=StringIO(), color_system="truecolor", force_terminal=True)
    console.print(text, markup=False, emoji=False, soft_wrap=True)
    return console.export_html(inline_styles=True, code_format=_PAGE)
