"""Every Python block of the README, the docs and the docstrings runs, page by page, in the order in which it stands."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

import recollect
from docs.pictures import IMAGES, pictures
from recollect import cli
from tests.zoo import CASES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TESTED_ELSEWHERE = {"program-file.md"}  # tests/program/test_json_format.py: its blocks need files
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


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


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TESTED_ELSEWHERE], ids=page_name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"} | (names_of_the_readme() if page.name == "README.md" else {})
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


def test_console_blocks_show_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After ``$ recollect ...`` come lines of its output, ``...`` for any others; an ``Error:`` may be cut off."""
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


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


EXAMPLES = sorted(path for path in (ROOT / "src").rglob("*.py") if ">>>" in path.read_text())


@pytest.mark.parametrize("source", EXAMPLES, ids=page_name)
def test_examples_of_docstrings_run(source: Path) -> None:
    module = ".".join(source.relative_to(ROOT / "src").with_suffix("").parts)
    ran = doctest.testmod(import_module(module))
    assert ran.attempted > 0
    assert ran.failed == 0


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}


def test_the_api_has_every_public_name() -> None:
    documented = re.findall(r"^::: recollect\.\S*?(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert set(recollect.__all__) <= set(documented)


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
