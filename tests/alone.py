"""Tests that need a process in which nothing else has happened: they go on in a new one, where that is so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_INSIDE = "AUTOREMAT_TEST_ALONE"


def goes_on_alone(request: pytest.FixtureRequest, *, needed: bool) -> bool:
    """Whether this test has just been run, well, in a process of its own, because it needs one here."""
    if not needed or os.environ.get(_INSIDE):
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", request.node.nodeid]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {_INSIDE: "1"},
        cwd=request.config.rootpath,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return True
