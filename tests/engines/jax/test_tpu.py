"""What XLA for TPU makes of a plan: compiled ahead of time, no TPU needed, but ``pip install libtpu``."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

pytestmark = pytest.mark.slow


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make test-all")
def test_a_gpt_for_a_tpu_takes_half_of_the_memory_for_less_than_checkpointed_blocks() -> None:
    """Their FLOPs are 1.22 of the plain ones, ours at most 1.12."""
    command = [sys.executable, "-m", "tests.engines.jax.tpu_worker"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, blocks, ours = found["plain"], found["jax.checkpoint"], found["0.25"]
    assert ours["bytes"] <= 0.5 * plain["bytes"]
    assert plain["flops"] < ours["flops"] <= 1.12 * plain["flops"] < blocks["flops"]
    assert found["floor"]["bytes"] <= ours["bytes"]
