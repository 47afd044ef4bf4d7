"""Lines of every room, and its largest class and function, as the tables of ``docs/design.md`` have them.

`python -m benchmarks.rooms` looks at the working tree; `python -m benchmarks.rooms b8cc038` at a commit.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "src/autoremat/"


@dataclass
class Room:
    """The files of a folder, added up.

    Attributes:
        lines: of all files.
        classes: lines and name of each class.
        functions: lines and name of each function or method.
    """

    lines: int = 0
    files: int = 0
    classes: list[tuple[int, str]] = field(default_factory=list)
    functions: list[tuple[int, str]] = field(default_factory=list)

    def add(self, source: str) -> None:
        """Add a file."""
        self.files += 1
        self.lines += len(source.splitlines())
        self._walk(ast.parse(source), "")

    def _walk(self, node: ast.AST, around: str) -> None:
        for n in ast.iter_child_nodes(node):
            if isinstance(n, ast.ClassDef | ast.FunctionDef):
                assert n.end_lineno is not None
                of_kind = self.classes if isinstance(n, ast.ClassDef) else self.functions
                of_kind.append((n.end_lineno - n.lineno + 1, around + n.name))
                self._walk(n, f"{around}{n.name}.")
            else:
                self._walk(n, around)


def sources(revision: str | None) -> Iterator[tuple[str, str]]:
    """Yield path below the package and text of every file."""
    if revision is None:
        for path in sorted(Path(PACKAGE).rglob("*.py")):
            yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        return
    listed = _git("ls-tree", "-r", "--name-only", revision, PACKAGE).split()
    for name in filter(lambda name: name.endswith(".py"), listed):
        yield name.removeprefix(PACKAGE), _git("show", f"{revision}:{name}")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def rooms(revision: str | None) -> dict[str, Room]:
    """Add up the files of every folder."""
    found: dict[str, Room] = {}
    for name, source in sources(revision):
        folder = name.rpartition("/")[0] or "(the package itself)"
        found.setdefault(folder, Room()).add(source)
    return {name: room for name, room in found.items() if room.lines > room.files}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="?", help="a commit; without it, the working tree")
    found = rooms(parser.parse_args().revision)
    print("| folder | files | lines | largest class | largest function |\n| --- | --- | --- | --- | --- |")
    for name, room in sorted(found.items()):
        largest = [max(sizes, default=(0, "none")) for sizes in (room.classes, room.functions)]
        cells = " | ".join(f"`{what}` {lines}" if lines else what for lines, what in largest)
        print(f"| `{name}` | {room.files} | {room.lines:,} | {cells} |")
    print(f"| all | {sum(r.files for r in found.values())} | {sum(r.lines for r in found.values()):,} | | |")


if __name__ == "__main__":
    main()
