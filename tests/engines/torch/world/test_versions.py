"""A torch that is newer than all that were tested is told of, once."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from autoremat.engines.torch.world.versions import TESTED, warn_if_untested

NEWER = """
import warnings, torch
torch.__version__ = "99.1.0+cpu"
import autoremat
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        autoremat.plan(lambda w: (w * 2).sum(), torch.ones(2, requires_grad=True), budget=1.0, timing="estimate")
print(*(f"{w.category.__name__}: {w.message}" for w in caught if "autoremat is tested" in str(w.message)), sep="\\n")
"""


@pytest.mark.parametrize("version", ["2.16.0", "2.16.0a0+git12", "3.0.1+cu140", "2.100.0"])
def test_a_newer_version_is_told_of(version: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"tested with torch {TESTED[0]} to {TESTED[1]}, this is {version[:4]}"):
        warn_if_untested(version)


@pytest.mark.parametrize("version", [*(f"{v}.1+cpu" for v in TESTED), "2.13.0", "2.9.1", "1.99.0", torch.__version__])
def test_a_tested_or_older_version_is_not(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(version)


@pytest.mark.slow
@pytest.mark.guard
def test_it_is_said_once_at_the_first_use() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4] / "src")}
    done = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, check=True, env=env)
    (line,) = done.stdout.splitlines()
    assert line.startswith("RuntimeWarning: autoremat is tested with torch 2.11 to 2.15, this is 99.1.0+cpu")
