"""Every block of the README, the docs and the docstrings runs, page by page, in the order in which it stands.

Python and console blocks are run, and what one page shows below them is what they print; what the lines of shell blocks
name is looked up, and completion scripts are loaded into a real shell; the JSON of ``program-file.md`` is read
elsewhere. Any other block only shows something.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import autoremat
from autoremat import cli
from autoremat.bench.catalog import Catalog
from autoremat.loading import load_function
from autoremat.planner import SOLVERS
from docs.pictures import IMAGES, pictures
from tests.planner.chains import gpt
from tests.zoo import CASES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
WITH_JSON = "program-file.md"  # tests/program/test_json_format.py reads its JSON
WITH_LIBRARIES = ("README.md", "docs/trainers.md")
"""Their blocks of ```py run in tests/integrations/test_blocks.py, with the libraries that they are about."""
TAKE_LONG = [
    f"docs/{name}.md"
    for name in ("explain", "how/plan", "how/show", "limits", "page", "program-file", "questions", "real-training",
                 "solvers/bounds", "solvers/chen", "solvers/chen-recursive", "solvers/dtr", "solvers/every-block",
                 "solvers/greedy")
] + ["src/autoremat/largest.py"]  # fmt: skip
"""Pages whose blocks take seconds: looked at by what guards."""
WITH_OUTPUT = "real-training.md"
"""A block of text right after a block of Python is what that prints; ``...`` stands for any lines."""
WITH_JAX = re.compile(r"\bimport (autoremat\.)?jax\b")
MANY_BYTES = re.compile(r"\b\d{1,3}(,\d{3})+\b")
"""Bytes, which differ a little between versions of torch."""
BLOCK_AND_OUTPUT = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.M | re.S)
FENCE = re.compile(r"^( *)(`{3,}|~{3,})([^\n]*)\n(.*?)^\1\2$", re.M | re.S)
COMMAND = re.compile(r"^ *(\$|>>>|autoremat|pip|python3?|make|git|cd|import|from) ", re.M)


of_the_compiler = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
"""It imports what torch calls deprecated."""


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass
class Output:
    """What models of the usual libraries return."""

    loss: Tensor


class Model(nn.Module):
    """A model that computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor, labels: Tensor) -> Output:
        return Output(F.cross_entropy(self.layers(x), labels))


def names_of_the_readme() -> dict[str, object]:
    """What a reader has at hand: a model, a batch, an optimizer."""
    model = Model()
    batch = {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 0, 1])}
    return {"F": F, "torch": torch, "model": model, "batch": batch, "optimizer": torch.optim.Adam(model.parameters())}


def marks_of(page: Path) -> tuple[pytest.MarkDecorator, ...]:
    if "integrations" in page.parts:  # their libraries take long to import
        return (pytest.mark.slow,)
    return (pytest.mark.slow, pytest.mark.guard) if page_name(page) in TAKE_LONG else ()


@of_the_compiler
@pytest.mark.parametrize("page", [pytest.param(p, id=page_name(p), marks=marks_of(p)) for p in PAGES])
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == WITH_JSON:  # the file that a reader brings
        gpt(6).to_json("step.json")
    log = logging.getLogger("autoremat")  # a reader may keep what a page does to it; other tests must not
    monkeypatch.setattr(log, "filters", list(log.filters))
    monkeypatch.setattr(log, "level", log.level)
    names: dict[str, object] = {"__name__": "docs"} | (names_of_the_readme() if page.name == "README.md" else {})
    for block, shown in BLOCK_AND_OUTPUT.findall(page.read_text()):
        if WITH_JAX.search(block) and find_spec("jax") is None:
            pytest.skip("needs jax")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(page), "exec"), names)
        if page.name == WITH_OUTPUT and shown:
            lines, output = (MANY_BYTES.sub("#", text).splitlines() for text in (shown, printed.getvalue()))
            assert is_shown(lines, output), printed.getvalue()


@pytest.mark.slow
@pytest.mark.guard
def test_console_blocks_show_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``$ autoremat ...`` come lines of its output, ``...`` for any others; an ``Error:`` may be cut off."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    pages = {page.name: re.findall(r"^```console\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES}
    assert len(pages["command-line.md"]) == 4
    for session in (part for blocks in pages.values() for block in blocks for part in block.split("$ ")[1:]):
        line, *shown = session.splitlines()
        name, *arguments = shlex.split(line)
        result = CliRunner().invoke(cli.main, arguments, prog_name=name)
        assert (result.exit_code == 0) == (not shown[0].startswith("Error:")), result.output
        assert is_shown(shown, result.output.splitlines()), f"{line}\n{result.output}"


def is_shown(shown: list[str], output: list[str]) -> bool:
    """Whether the lines shown are those of the output, in that order, but for what ``...`` stands for."""
    if shown and shown[0] == "...":
        return any(is_shown(shown[1:], output[k:]) for k in range(len(output) + 1))
    if not shown or not output:
        return not shown and not output
    if shown[0].startswith("Error:") and shown[1:] == ["..."]:
        return output[0].startswith(shown[0])
    return shown[0].rstrip() == output[0].rstrip() and is_shown(shown[1:], output[1:])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_name)
def test_no_block_is_left_out(page: Path) -> None:
    text = page.read_text()
    blocks = FENCE.findall(text)
    assert 2 * len(blocks) == len(re.findall(r"^ *(?:```|~~~)", text, re.M))
    for indent, _, language, block in blocks:
        if language in ("python", "console", "sh"):
            assert not indent, f"indented blocks are not run:\n{block}"
        elif language == "json":
            assert page.name == WITH_JSON
        elif language == "py":
            assert page_name(page) in WITH_LIBRARIES
        else:
            assert language in ("", "text"), language
            assert not COMMAND.search(block), f"looks like something to run, and says nothing of the kind:\n{block}"


def shell_lines() -> list[str]:
    blocks = re.findall(
        r"^```sh\n(.*?)^```", "".join(p.read_text() for p in [*PAGES, ROOT / "CONTRIBUTING.md"]), re.M | re.S
    )
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("line", shell_lines())
def test_shell_lines_name_what_is_there(line: str) -> None:
    completion = re.search(r"_AUTOREMAT_COMPLETE=(\w+)_source autoremat", line)
    if completion:
        source = {"_AUTOREMAT_COMPLETE": f"{completion[1]}_source"}
        script = CliRunner().invoke(cli.main, [], prog_name="autoremat", env=source).output
        assert f"_AUTOREMAT_COMPLETE={completion[1]}_complete" in script
        return
    command, *arguments = shlex.split(line, comments=True)
    if command == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets)
    elif command == "pip":
        extras = re.findall(r"\[(\w+)\]", line)
        assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M) for extra in extras)
        assert arguments[:1] == ["install"]
    elif command == "autoremat":
        assert_contest_is_there(arguments)
    else:
        assert line in ("git clone <this repository>", "cd autoremat")


def assert_contest_is_there(arguments: list[str]) -> None:
    """Read the arguments of ``autoremat bench`` as click does, and look up the solver and the programs."""
    name, *rest = arguments
    assert name == "bench", "other commands stand in console blocks, which are run"
    asked = cli.main.commands[name].make_context(name, rest).params
    assert asked["solver"] in SOLVERS or callable(load_function(asked["solver"]))
    assert any(asked["only"] in task.name for task in Catalog.at(ROOT / asked["programs"]).tasks)


def test_the_completion_of_the_docs_completes_in_bash(tmp_path: Path) -> None:
    """The line of the docs, as it stands, in a shell that finds ``autoremat`` as a user's would."""
    (line,) = [line for line in shell_lines() if "bash_source" in line]
    command = tmp_path / "autoremat"
    command.write_text(f"#!{sys.executable}\nfrom autoremat.cli import main\nmain()\n")
    command.chmod(0o755)
    script = f"""{line}
complete -p autoremat
for words in "autoremat pl" "autoremat solve --solver chen-"; do
  COMP_WORDS=($words) COMP_CWORD=$(( $(wc -w <<< "$words") - 1 )) COMPREPLY=()
  _autoremat_completion autoremat; echo "${{COMPREPLY[@]}}"
done"""
    here = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["bash", "-c", script], env=here, capture_output=True, text=True, check=True)
    registered, *completed = done.stdout.splitlines()
    assert registered.endswith("_autoremat_completion autoremat")
    assert completed == ["plan", "chen-recursive"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


EXAMPLES = sorted(path for path in (ROOT / "src").rglob("*.py") if ">>>" in path.read_text())


@of_the_compiler
@pytest.mark.parametrize(
    "source",
    [pytest.param(p, id=page_name(p), marks=marks_of(p)) for p in EXAMPLES],
)
def test_examples_of_docstrings_run(source: Path) -> None:
    module = ".".join(source.relative_to(ROOT / "src").with_suffix("").parts)
    if "jax" in module.split("."):
        pytest.importorskip("jax")
    ran = doctest.testmod(import_module(module))
    assert ran.attempted > 0
    assert ran.failed == 0


WITH_SHORT_LINES = [
    "*.py", "demo/*.py", "engines/*.py", "engines/numpy/*.py", "engines/torch/eager/*.py",
    "engines/torch/operators/*.py", "engines/torch/recording/*.py", "engines/torch/world/*.py",
    "integrations/*.py", "planner/*.py", "planner/solvers/*.py", "program/*.py", "show/**/*.py",
]  # fmt: skip
"""The rooms whose docstrings begin with a short line, which has a verb where something is done."""
NO_VERBS = {
    "A", "All", "An", "As", "At", "By", "Every", "For", "How", "In", "Of",
    "That", "The", "These", "This", "What", "When", "Where", "Whether", "Which", "Why",
}  # fmt: skip


def first_lines(path: Path) -> Iterator[tuple[str, bool, str]]:
    """Name, whether it is a function, and first line of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            of_data = any("property" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
            name = getattr(node, "name", "")
            yield f"{path.name} {name}", isinstance(node, ast.FunctionDef) and not of_data, text.splitlines()[0]


@pytest.mark.parametrize("files", WITH_SHORT_LINES)
def test_first_lines_of_docstrings_are_short(files: str) -> None:
    """At most twelve words, a verb first where something is done; what else there is to say stands below."""
    lines = [line for path in (ROOT / "src" / "autoremat").glob(files) for line in first_lines(path)]
    assert lines
    assert [line for line in lines if len(line[2].split()) > 12 or not line[2].endswith(".")] == []
    assert [line for line in lines if line[1] and line[2].split()[0] in NO_VERBS] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}


def test_the_api_has_every_public_name() -> None:
    documented = re.findall(r"^::: autoremat\.\S*?(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert set(autoremat.__all__) <= set(documented)


def files_in_the_design() -> list[str]:
    """The files named in the tables of the design, with their folder, which a heading names."""
    found = []
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for folder, section in re.findall(r"^### `([^`]+)/`\n(.*?)(?=^#|\Z)", text, re.M | re.S):
        cells = re.findall(r"^\| (`[^|]+) \|", section, re.M)
        inside = "" if folder == "src/autoremat" else f"{folder}/"
        found += [inside + name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return found


def test_the_design_names_every_file_once() -> None:
    source = ROOT / "src" / "autoremat"
    kinds = (".py", ".js", ".css", ".html")
    files = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix in kinds]
    named = files_in_the_design()
    assert len(named) > 150
    assert sorted(named) == sorted(f for f in files if not f.endswith("/__init__.py"))


def test_the_life_of_one_step_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = text.partition("## The life of one step")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", section))
    known = files_in_the_design()
    assert len(named) > 30
    assert {name for name in named if not any(f == name or f.endswith(f"/{name}") for f in known)} == set()


def test_the_pictures_of_the_three_layers_are_what_the_script_draws() -> None:
    for name, text in pictures().items():
        assert (IMAGES / name).read_text(encoding="utf-8") == text, "run python -m docs.pictures"


def test_the_gallery_has_every_network_of_the_tests() -> None:
    assert re.findall(r"^## (.*)$", (ROOT / "docs" / "gallery.md").read_text(), re.M) == [str(case) for case in CASES]


def test_the_page_of_attacks_names_tests_that_exist() -> None:
    known = {
        name
        for source in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", source.read_text(encoding="utf-8"), re.M)
    }
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|", (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8"), re.M)
    named = [name for cell in rows for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) > 150
    assert not set(named) - known
