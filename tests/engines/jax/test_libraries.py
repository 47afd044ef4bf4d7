"""Flax (Linen and NNX), Equinox, Optax: their gradients of checkpointed functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional

from tests.engines.jax.models import QUIET, checkpoint, error, tightest  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(QUIET),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries
]
LIMIT = 2e-6
X = jax.random.normal(jax.random.key(0), (16, 8))
Loss = Callable[..., Any]


def linen() -> tuple[Loss, tuple[Any, ...], bool]:
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(2):
                x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x)))
            return x

    model = Network()
    known = model.init(jax.random.key(1), X)

    def loss(params: Any, stats: Any, x: Any) -> Any:
        out, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (out**2).mean(), new["batch_stats"]

    return loss, (known["params"], known["batch_stats"], X), True


def nnx() -> tuple[Loss, tuple[Any, ...], bool]:
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(self.dropout(nnx.gelu(self.norm(self.first(x)))))

    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params: Any, rest: Any, x: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        value = (model(x) ** 2).mean()
        return value, nnx.split(model, nnx.Param, ...)[2]

    return loss, (params, rest, X), True


def equinox() -> tuple[Loss, tuple[Any, ...], bool]:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, "scalar", 16, 2, key=jax.random.key(1))
    return lambda model, x: (jax.vmap(model)(x) ** 2).mean(), (model, X), False


@pytest.mark.parametrize("library", [linen, nnx])
def test_gradients_and_state_are_those_of_plain_training(library: Callable[[], Any]) -> None:
    loss, args, has_aux = library()
    checkpointed = checkpoint(loss, budget=0.9)
    found, expected = (jax.jit(jax.grad(fn, has_aux=has_aux))(*args) for fn in (checkpointed, loss))
    assert error(found, expected) <= LIMIT


def test_equinox_differentiates_its_modules() -> None:
    eqx = pytest.importorskip("equinox")
    loss, args, _ = equinox()
    found, expected = (eqx.filter_jit(eqx.filter_grad(fn))(*args) for fn in (checkpoint(loss, budget=0.9), loss))
    assert error(found, expected) <= LIMIT


def test_a_module_that_changes_itself_is_refused_with_the_way_out() -> None:
    """Its new statistics would be lost."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"changes its argument in place .*copy=True"):
        nnx.grad(checkpoint(lambda model: (model(X) ** 2).mean(), budget=1.0))(model)


def test_a_module_of_nnx_without_state_is_differentiated_as_it_is() -> None:
    nnx = pytest.importorskip("flax.nnx")

    def loss(model: Any) -> Any:
        return (model(X) ** 2).mean()

    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    found, expected = (nnx.grad(fn)(model) for fn in (checkpoint(loss, budget=1.0), loss))
    assert error(found, expected) <= LIMIT


def test_a_step_of_optax_trains_like_the_plain_one() -> None:
    optax = pytest.importorskip("optax")
    optimizer = optax.sgd(0.1)

    def loss(w: Any, x: Any) -> Any:
        return (jnp.tanh(jnp.tanh(x @ w) @ w) ** 2).mean()

    def trained(loss: Loss) -> Any:
        @jax.jit
        def step(w: Any, state: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(w, X), state, w)
            return optax.apply_updates(w, updates), state

        w = jnp.eye(8)
        state = optimizer.init(w)
        for _ in range(5):
            w, state = step(w, state)
        return w

    assert error(trained(tightest(loss, jnp.eye(8), X)), trained(loss)) <= LIMIT
