"""What tests of the command line share: files to name, commands to call, lines to expect."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from autoremat import cli
from tests.program.hand import chain


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "chain.json"
    chain().to_json(path)
    return str(path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, list(arguments))


def assert_one_line(result: Result, *parts: str, code: int = 1) -> None:
    """The command failed with one line of the form ``Error: ...`` that has all of these parts."""
    assert result.exit_code == code, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


MODELS = str(Path(__file__).parent.parent / "examples" / "models.py")
STEPS = """
import sys
import warnings

import torch
from torch import nn

def mlp():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
    return lambda x, scale: (model(x) * scale).sum(), (torch.randn(64, 16),), {"scale": 2.0}

def meta():
    with torch.device("meta"):
        return nn.Linear(1 << 20, 1 << 20), (torch.empty(64, 1 << 20),)

def raises():
    raise RuntimeError("no\\nweights")

def tensor():
    return torch.ones(3)

def no_args():
    return nn.Linear(2, 2), torch.ones(3, 2)

def no_kwargs():
    return nn.Linear(2, 2), (torch.ones(3, 2),), 4

def stops():
    raise SystemExit(0)

def stops_inside():
    return (lambda x: sys.exit(0)), (torch.ones(3, 2),)

def fails_inside():
    def step(x):
        raise ValueError("odd number of rows")
    return step, (torch.ones(3, 2),)

def warns():
    layer = nn.Linear(2, 2)
    def step(x):
        warnings.warn("odd\\nrows")
        return layer(x).square().sum()
    return step, (torch.ones(3, 2),)

def looks():
    return (lambda x: (x * x.sum().item()).sum()), (torch.ones(3, 2, device="meta", requires_grad=True),)

def nothing():
    return nn.Linear(2, 2).requires_grad_(False), (torch.ones(3, 2),)

number = 4
"""


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, which is the current one, with models of all sorts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "broken.py").write_text("import steps\nnot_a_name\n")
    (tmp_path / "needs.py").write_text("import not_installed\n")
    yield tmp_path
    for name in ("steps", "broken", "needs"):
        sys.modules.pop(name, None)
