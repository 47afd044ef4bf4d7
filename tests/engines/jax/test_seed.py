"""The three layers of the docs' first page and a network that learns XOR, in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional

import autoremat  # noqa: E402
import autoremat.jax as aj  # noqa: E402
from tests.engines.jax.models import QUIET, error  # noqa: E402

pytestmark = pytest.mark.filterwarnings(QUIET)


def three_layers(ws: Any, x: Any) -> Any:
    with jax.named_scope("A1"):
        a1 = jax.nn.sigmoid(x @ ws[0])
    with jax.named_scope("A2"):
        a2 = jax.nn.sigmoid(a1 @ ws[1])
    with jax.named_scope("Y"):
        return (a2 @ ws[2]).sum()


def inputs() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, (64, 64)) for k in keys[:3]], jax.random.normal(keys[3], (512, 64))


@pytest.mark.slow
@pytest.mark.guard
def test_three_layers_are_planned_as_by_hand_and_as_for_torch(tmp_path: Path) -> None:
    """Keep A2, compute A1 again: one matrix product and one sigmoid."""
    pytest.importorskip("torch")
    import torch

    ws, x = inputs()
    plan = aj.plan(three_layers, ws, x, budget=0.9)
    again = [plan.program.ops[i] for i, _ in autoremat.simulate(plan.program, plan).repeats]
    assert [(op.module, op.name) for op in again] == [("A1", "dot_general"), ("A1", "logistic")]
    assert autoremat.verify(plan.program, plan) == ()

    tensors = [torch.zeros(64, 64, requires_grad=True) for _ in ws]

    def step(x: torch.Tensor) -> torch.Tensor:
        return (torch.sigmoid(torch.sigmoid(x @ tensors[0]) @ tensors[1]) @ tensors[2]).sum()

    of_torch = autoremat.plan(step, torch.zeros(512, 64), budget=0.9)
    repeated = [of_torch.program.ops[i].name for i, _ in autoremat.simulate(of_torch.program, of_torch).repeats]
    assert repeated == ["aten.mm.default", "aten.sigmoid.default"]
    assert "A1" in plan.save_html(tmp_path / "plan.html").read_text(encoding="utf-8")


def test_three_layers_have_the_gradients_by_hand() -> None:
    ws, x = inputs()
    found = jax.jit(jax.grad(aj.checkpoint(three_layers, budget=0.9)))(ws, x)
    a1 = jax.nn.sigmoid(x @ ws[0])
    a2 = jax.nn.sigmoid(a1 @ ws[1])
    dy = jnp.ones((512, 64))
    dz2 = dy @ ws[2].T * (1 - a2) * a2
    dz1 = dz2 @ ws[1].T * (1 - a1) * a1
    assert error(found, [x.T @ dz1, a1.T @ dz2, a2.T @ dy]) <= 2e-6


@pytest.mark.slow
@pytest.mark.guard
def test_a_network_learns_xor_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.xor_jax import main

    assert main() < 0.1
    printed = capsys.readouterr().out
    assert "plain  above the budget" in printed
    assert "100% right" in printed
