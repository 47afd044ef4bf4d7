"""Both engines in one process."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("jax")

CODE = """
import jax, jax.numpy as jnp
jax.grad(lambda x: x.sum())(jnp.ones(3))  # threads of JAX
import torch, autoremat
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(2)])
print(autoremat.plan(model, torch.randn(512, 64), budget="100%", timing="estimate").overhead)
"""


def test_a_dry_run_of_torch_forks_without_a_word_of_jax() -> None:
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0.0\n", "")
