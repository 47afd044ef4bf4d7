"""Distributed jobs in real processes, with autoremat and without, bit by bit (see ``parallel_worker``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "parallel_worker.py"
ROOT = WORKER.parents[4]
SECONDS = 240
"""A deadlock shows itself after this time."""

JOBS = {
    "DistributedDataParallel": (2, ("ddp", "ddp-outer", "ddp-inner", "ddp-buffers", "ddp-accumulate")),
    "its options": (2, ("ddp-views", "ddp-kept-gradients", "ddp-unused", "ddp-static")),
    "fully_shard": (2, ("fsdp", "fsdp-floor", "fsdp-kept", "fsdp-root-freed", "fsdp-accumulate")),
    "fully_shard, other orders and options": (
        2,
        ("fsdp-outer", "fsdp-inner", "fsdp-blocks", "fsdp-tied", "fsdp-mixed"),
    ),
    "DTensor": (2, ("tensor-parallel", "sequence-parallel")),
    "a stage of a pipeline": (2, ("pipeline-by-hand", "pipeline", "pipeline-1f1b")),
    "collectives in the forward": (2, ("collectives", "collectives-real", "deviation", "infeasible")),
    "four processes": (4, ("ddp", "fsdp", "tensor-parallel", "pipeline")),
}

GUARDS = dict.fromkeys(("DistributedDataParallel", "fully_shard"), pytest.mark.guard)
"""Those that continuous integration runs."""


def torchrun(n: int, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONPATH": path}
    script = [*command, str(script), *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=SECONDS, env=env, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("job", [pytest.param(j, marks=GUARDS.get(j, ())) for j in JOBS])
def test_as_without_autoremat(job: str) -> None:
    n, cases = JOBS[job]
    done = torchrun(n, WORKER, *cases)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    for case in cases:
        assert done.stdout.count(f": {case} passed") == n, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_example_trains(how: str) -> None:
    done = torchrun(2, ROOT / "examples" / "ddp_gpt.py", how, "3", "60%")
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout.count("operators ran again in 3 steps") == 2, done.stdout
    assert " 0 operators" not in done.stdout
