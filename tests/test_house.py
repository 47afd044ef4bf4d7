"""The laws of the house: which room may know which, no circles, nothing too large; read from the source itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import autoremat

ROOT = Path(autoremat.__file__).parent
ALLOWED = {
    "program": set(),
    "planner": {"program"},
    "show": {"program"},
    "bench": {"program", "planner"},
    "engines": {"program"},
    "engines.numpy": {"program"},
    "engines.jax": {"program", "planner"},
    "engines.torch.operators": {"program"},
    "engines.torch.world": {"program", "engines.torch.operators"},
    "engines.torch.recording": {"program", "engines.torch.operators", "engines.torch.world"},
    "engines.torch.eager": {
        "program", "planner", "engines", "engines.torch.operators", "engines.torch.world", "engines.torch.recording"
    },
    "engines.torch.compiled": {"program", "planner", "engines", "engines.torch.operators", "engines.torch.world"},
    "integrations": {"top", "planner", "engines.torch.eager"},
    "demo": {"top", "engines.torch.world"},
}  # fmt: skip
"""What each room may import, beside itself. An engine for trainings plans while they run, so it knows the planner."""
FETCHED = {
    "program.model": {"program.json_format"},
    "program.plan": {"program.json_format", "show.page", "show.plots", "show.report.render", "show.text"},
    "program.repeats": {"program.json_format"},
    "planner.frontiers": {"show.page", "show.plots", "show.text"},
    "show.explanation": {"show.explanation_lines"},
}
"""Programs, plans, frontiers and explanations print and save themselves: each fetches what does it when it is asked."""
LARGEST_CLASS_LINES, MOST_ATTRIBUTES = 200, 12
LARGER = {
    "engines.torch.eager.backward.Backward": (259, 14),
    "engines.torch.eager.entry.Entry": (92, 15),
    "engines.torch.eager.follow.Follow": (266, 10),
    "engines.torch.eager.kinds.Prepared": (101, 22),
    "engines.torch.eager.noting.Noting": (280, 10),
    "engines.torch.eager.passes.Passes": (93, 14),
    "engines.torch.eager.planning.Planning": (235, 4),
    "engines.torch.eager.tape.Tape": (215, 20),
    "engines.torch.recording.recording.RecordedOp": (23, 14),
    "planner.bounds.stages.Stages": (259, 11),
    "planner.search.account.Accountant": (114, 17),
    "planner.search.evict.Executor": (209, 19),
    "planner.search.pool.Pool": (255, 9),
    "planner.search.search.Search": (237, 10),
    "program.verifier._Machine": (165, 15),
}
"""Classes that are still larger, with their lines and attributes: no more than these."""


@dataclass(frozen=True)
class Module:
    """A file of the package."""

    name: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder that it is in; of the torch engines one further down; ``top`` for the package's own files."""
        parts = self.name.split(".")
        if len(parts) == 1 and not (ROOT / parts[0]).is_dir():
            return "top"
        if not (ROOT / parts[0] / parts[-1]).is_dir() and len(parts) == 2 and parts[0] == "engines":
            return "engines"  # what every engine can do
        deep = 3 if parts[:2] == ["engines", "torch"] else 2 if parts[0] == "engines" else 1
        return ".".join(parts[:deep])

    @cached_property
    def imported(self) -> tuple[str, ...]:
        """What it imports, read once."""
        return tuple(self.imports())

    def imports(self) -> Iterator[str]:
        """What it imports of the package, at once or late; not what only types name."""
        typed = {id(n) for node in ast.walk(self.tree) if is_for_types(node) for n in ast.walk(node)}
        for node in ast.walk(self.tree):
            if id(node) in typed:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autoremat"):
                inside = str(node.module).removeprefix("autoremat").lstrip(".")
                for alias in node.names:
                    full = f"{inside}.{alias.name}".lstrip(".")
                    yield full if full in FILES else inside
            elif isinstance(node, ast.Import):
                yield from (a.name.removeprefix("autoremat.") for a in node.names if a.name.startswith("autoremat."))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
MODULES = [Module(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in FILES.items()]
ROOM_OF = {m.name: m.room for m in MODULES}


def test_every_room_is_in_the_table() -> None:
    assert {m.room for m in MODULES if m.name} - {"engines.torch"} == {*ALLOWED, "top"}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room: str) -> None:
    wrong = [
        f"{module.name} imports {found}"
        for module in MODULES
        for found in module.imported
        if module.room == room
        and ROOM_OF[found] not in {room, *ALLOWED[room]}
        and found not in FETCHED.get(module.name, ())
    ]
    assert wrong == []


def test_nobody_imports_the_command_line() -> None:
    assert [m.name for m in MODULES if "cli" in m.imported] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    """But for what data fetch to print and save themselves."""
    left = {m.name: set(m.imported) - {m.name} - FETCHED.get(m.name, set()) for m in MODULES}
    while ends := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in ends:
            del left[name]
    assert left == {}


def test_what_data_fetch_is_fetched_late() -> None:
    """Not when the file is imported: a program, a planner and a judge load nothing that draws."""
    early = {
        f"{m.name} imports {i}"
        for m in MODULES
        for i in Module(m.name, ast.Module([n for n in m.tree.body if not is_definition(n)], [])).imports()
        if i in FETCHED.get(m.name, ())
    }
    assert early == set()


def test_no_function_bears_the_name_of_its_file() -> None:
    """It would hide the file where a package passes it on."""
    same = [m.name for m in MODULES for n in m.tree.body if is_definition(n) and n.name == m.name.split(".")[-1]]  # type: ignore[attr-defined]
    assert same == []


def is_definition(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


PURE_ROOMS = ("program", "planner", "show", "engines.numpy")
"""Rooms that need no framework."""
PURE = [name for name, room in ROOM_OF.items() if room in PURE_ROOMS]


@pytest.mark.parametrize("form", ["import {}", "import {} as m", "import importlib; importlib.import_module('{}')"])
def test_pure_files_are_imported_without_torch(form: str) -> None:
    """In a process in which there is none, in all three forms of import."""
    lines = ["import sys", "sys.modules['torch'] = None"]
    lines += [form.format(f"autoremat.{name}") for name in PURE]
    lines += ["assert sys.modules['torch'] is None"]
    subprocess.run([sys.executable, "-W", "error", "-c", "\n".join(lines)], check=True)


# ---- sizes -------------------------------------------------------------------------------------------------------


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module in MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                yield f"{module.name}.{node.name}", node


def size_of(node: ast.ClassDef) -> tuple[int, int]:
    """Lines, and attributes of an instance: those that are annotated in the class, and those that are set on self."""
    assert node.end_lineno is not None
    annotated = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    own = {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name) and n.value.id == "self"
    }  # fmt: skip
    return node.end_lineno - node.lineno + 1, len(annotated | own)


def is_data(node: ast.ClassDef) -> bool:
    """Whether a class is mere data: it has no state to lose sight of."""
    return any("dataclass" in ast.unparse(d) and "frozen=True" in ast.unparse(d) for d in node.decorator_list) or any(
        "NamedTuple" in ast.unparse(b) for b in node.bases
    )


def test_classes_are_small() -> None:
    found = {name: size_of(node) for name, node in classes()}
    data = {name for name, node in classes() if is_data(node)}
    large = {
        name: (lines, attributes)
        for name, (lines, attributes) in found.items()
        if lines > LARGEST_CLASS_LINES or (attributes > MOST_ATTRIBUTES and name not in data)
    }
    assert large.keys() == LARGER.keys(), "take a class that is small by now out of the table, and split a new one"
    grown = {name: size for name, size in large.items() if size[0] > LARGER[name][0] or size[1] > LARGER[name][1]}
    assert grown == {}


# ---- tests -------------------------------------------------------------------------------------------------------

TESTS = Path(__file__).parent
MOST_TEST_LINES = 400
TEST_FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))
OF_NO_ROOM = {
    "gpu": "what only a CUDA device can tell: `make gpu` runs the folder",
    "engines/torch/eager/attacks": "steps written to break the engine, by what they attack",
    "engines/torch/eager/fuzz": "random programs: how they are drawn, run and judged",
    "engines/torch/eager/sweeps": "all operators and modules of torch",
}
"""Folders of tests that mirror no folder of the package, and what they have instead."""


def test_tests_mirror_the_package() -> None:
    folders = {path.parent.as_posix() for path in TEST_FILES}
    assert {folder for folder in folders if not (ROOT / folder).is_dir()} == OF_NO_ROOM.keys()


def test_every_room_has_tests() -> None:
    tested = {path.parent.as_posix() for path in TEST_FILES if path.name.startswith("test_")}
    assert {room.replace(".", "/") for room in ALLOWED} - tested == set()


def test_files_of_tests_are_small() -> None:
    lines = {path.as_posix(): len((TESTS / path).read_text(encoding="utf-8").splitlines()) for path in TEST_FILES}
    assert {name: n for name, n in lines.items() if n > MOST_TEST_LINES} == {}


def test_helpers_come_from_helpers() -> None:
    """A file of tests is imported by nobody, also not in the text of a script or by a benchmark."""
    others = [path for folder in ("benchmarks", "docs", "examples") for path in (TESTS.parent / folder).glob("*.py")]
    form = re.compile(r"^\s*(?:from|import)\s+tests\.(?:\w+\.)*test_|^\s*from\s+tests[.\w]*\s+import\s.*\btest_", re.M)
    found = [path for path in (*map(TESTS.joinpath, TEST_FILES), *others) if form.search(path.read_text())]
    assert found == []
