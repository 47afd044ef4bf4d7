"""The three layers of the docs' first page and a network that learns XOR, in JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional
import numpy as np  # noqa: E402

import autoremat  # noqa: E402
import autoremat.jax as aj  # noqa: E402
from tests.engines.jax.models import QUIET, error  # noqa: E402
from tests.engines.jax.pictures import picture  # noqa: E402

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


def layers_of_torch(ws: Any, names: list[str], activation: Any, loss: Any) -> Any:
    """The layers as modules of torch, which end in a loss."""
    import torch

    class Layer(torch.nn.Module):
        def __init__(self, w: Any, is_last: bool) -> None:
            super().__init__()
            self.w, self.is_last = torch.nn.Parameter(torch.from_numpy(np.array(w))), is_last

        def forward(self, x: Any) -> Any:
            return x @ self.w if self.is_last else activation(x @ self.w)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, w in zip(names, ws, strict=True):
                self.add_module(name, Layer(w, name == names[-1]))

        def forward(self, x: Any) -> Any:
            for layer in self.children():
                x = layer(x)
            return loss(x)

    return Network()


def layers_of_jax(names: list[str], activation: Any, loss: Any) -> Any:
    def fn(ws: Any, x: Any) -> Any:
        for name, w in zip(names, ws, strict=True):
            with jax.named_scope(name):
                x = x @ w if name == names[-1] else activation(x @ w)
        return loss(x)

    return fn


KEEP_A2 = [
    "A1 forward #.", "A2 forward .#", "Y forward .#", "Y backward .#", "A2 backward ..", "A1 again #.",
    "A2 backward #.", "A1 backward ..",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("budget", [1.0, 0.9])
@pytest.mark.parametrize("network", ["three layers", "XOR"])
def test_the_same_picture_as_beside_torch(network: str, budget: float) -> None:
    """The same layers run and run again in the same order, and the same activations are there behind each."""
    torch = pytest.importorskip("torch")
    from examples.xor_jax import inputs as cases

    if network == "XOR":
        _, x, y = cases()
        names, sizes = ["A1", "A2", "A3", "A4", "Y"], [2, 16, 16, 16, 16, 1]
        answers = torch.from_numpy(np.array(y))
        of_jax = layers_of_jax(names, jnp.tanh, lambda z: ((z - y) ** 2).mean())
        keys = jax.random.split(jax.random.key(0), len(names))
        ws = [jax.random.normal(k, (a, b)) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]
        of_torch = layers_of_torch(ws, names, torch.tanh, lambda z: ((z - answers) ** 2).mean())
    else:
        ws, x = inputs()
        names = ["A1", "A2", "Y"]
        of_jax = layers_of_jax(names, jax.nn.sigmoid, jnp.sum)
        of_torch = layers_of_torch(ws, names, torch.sigmoid, torch.sum)
    found = picture(aj.plan(of_jax, ws, x, budget=budget), names)
    beside = autoremat.plan(of_torch, torch.from_numpy(np.array(x)), budget=budget, timing="estimate")
    assert found == picture(beside, names)
    assert any("again" in line for line in found) == (budget < 1.0)
    if network == "three layers" and budget < 1.0:
        assert found == KEEP_A2


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
