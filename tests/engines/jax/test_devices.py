"""Several devices: gradients are those of plain JAX, budgets are those of one device, and nothing is sent twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("jax")

pytestmark = [pytest.mark.slow, pytest.mark.guard]
EXACT = 1e-12
DEVICES = "--xla_force_host_platform_device_count=4"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process with four devices finds."""
    command = [sys.executable, "-m", "tests.engines.jax.devices_worker"]
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    assert results["devices"] == 4
    return results


SHARDED = ["shard_map", "batch", "weights", "batch, explicit"]


@pytest.mark.parametrize("case", [*SHARDED, "shard_map that communicates", "around a shard_map", "pmap", "fit"])
def test_gradients_are_those_of_plain_jax(found: dict[str, Any], case: str) -> None:
    assert found[case]["error"] <= EXACT
    assert found[case].get("against one device", 0.0) <= EXACT


@pytest.mark.parametrize("case", [*SHARDED, "shard_map that communicates"])
def test_each_device_takes_less(found: dict[str, Any], case: str) -> None:
    plain, ours = found[case]["bytes"]
    assert ours < 0.75 * plain


@pytest.mark.parametrize("case", ["shard_map", "shard_map that communicates", "around a shard_map"])
def test_nothing_is_sent_twice(found: dict[str, Any], case: str) -> None:
    """Twelve times in two forwards and backwards of six layers, whatever is computed again."""
    plain, ours = found[case]["collectives"]
    assert ours == plain > 0


def test_a_fitted_step_is_within_its_budget_on_each_device(found: dict[str, Any]) -> None:
    """By XLA's account, in which an argument that is sharded counts with its part alone."""
    fitted = found["fit"]
    assert fitted["total"] <= fitted["budget"]
    assert fitted["tries"] > 1
    assert fitted["arguments"] < fitted["batch"]
