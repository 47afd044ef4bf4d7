"""Every Python block of the README and the docs runs, page by page, in the order in which it stands."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn

from recollect import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TESTED_ELSEWHERE = {"program-file.md"}  # tests/program/test_json_format.py: its blocks need files
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


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


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in TESTED_ELSEWHERE], ids=lambda p: p.name)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
