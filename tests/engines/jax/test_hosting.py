"""Values in the memory of the host: refused on CPU, lowered by JAX's names for it, and the same gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autoremat.jax
from autoremat.engines.jax.planning import _PLANS
from autoremat.program import Link, verify


def loss(weights: list[Any], x: Any) -> Any:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x.sum()


def arguments() -> tuple[list[Any], Any]:
    keys = jax.random.split(jax.random.key(0), 9)
    return [jax.random.normal(k, (32, 32)) / 6 for k in keys[1:]], jax.random.normal(keys[0], (256, 32))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about the CPU backend")
def test_on_cpu_it_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="on the CPU backend both are the same memory"):
        autoremat.jax.checkpoint(loss, budget=0.6, offload="host")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"offload": "disk:/tmp"}, 'None or "host" under JAX'),
        ({"offload_budget": "1GiB"}, "which is not given"),
    ],
)
def test_what_is_no_tier_is_refused(asked: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        autoremat.jax.checkpoint(loss, budget=0.6, **asked)  # type: ignore[call-overload]


@pytest.mark.filterwarnings("ignore::autoremat.jax.BarriersRemoved")  # what is only lowered is not compiled
def test_it_is_lowered_by_name_and_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA on CPU takes both memories for one, so that the code runs here; its placements are those for a GPU."""
    link = Link(1e15, 1e15, name="host")
    monkeypatch.setattr(autoremat.jax, "link_of", lambda offload, budget: link if offload else None)
    _PLANS.clear()
    weights, x = arguments()
    gradient = jax.grad(autoremat.jax.checkpoint(loss, budget=0.6, offload="host", time_limit_seconds=0.2))
    step = jax.jit(gradient, compiler_options=autoremat.jax.compiler_options())
    got, plain = step(weights, x), jax.jit(jax.grad(loss))(weights, x)
    assert all(jnp.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, plain, strict=True))
    (plan,) = _PLANS.values()
    n = len(plan.schedule.offloads)
    assert n > 0
    assert verify(plan.program, plan) == ()
    text = jax.jit(gradient).trace(weights, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('_xla_buffer_placement = "pinned_host"') == n
    assert text.count('_xla_buffer_placement = "device"') == n
    without = jax.jit(jax.grad(autoremat.jax.checkpoint(loss, budget=0.6, time_limit_seconds=0.2)))
    assert "_xla_buffer_placement" not in without.trace(weights, x).lower(lowering_platforms=("cuda",)).as_text()
