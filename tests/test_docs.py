"""Every Python block of the README and the docs runs, page by page, in the order in which it stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
