"""Puts what a script prints into its section of a page: from ``<!-- benchmarks/NAME.py -->`` to ``<!-- end -->``."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
END = "<!-- end -->"


def write_section(page_name: str, script: str, text: str) -> None:
    """Replace the section of a script.

    Raises:
        ValueError: the page has no such section.
    """
    page = DOCS / page_name
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- benchmarks/{script} -->")
    if END not in rest:
        raise ValueError(f"{page} has no section of benchmarks/{script}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{rest[rest.index(END) :]}", encoding="utf-8")
