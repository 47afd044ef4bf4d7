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


def network_of_nnx() -> Any:
    """A model that changes itself when it is called: statistics, and the count of random keys."""
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(self.dropout(nnx.gelu(self.norm(self.first(x)))))

    return Network(nnx.Rngs(0))


def nnx() -> tuple[Loss, tuple[Any, ...], bool]:
    nnx = pytest.importorskip("flax.nnx")
    graph, params, rest = nnx.split(network_of_nnx(), nnx.Param, ...)

    def loss(params: Any, rest: Any, x: Any) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        value = (model(x) ** 2).mean()
        return value, nnx.split(model, nnx.Param, ...)[2]

    return loss, (params, rest, X), True


def haiku() -> tuple[Loss, tuple[Any, ...], bool]:
    """A pair of init and apply made of a function that asks for its parameters by name, as ``hk.transform`` does."""
    frame: dict[str, Any] = {}

    def linear(x: Any, name: str) -> Any:
        if name not in frame:
            frame[name] = jax.random.normal(jax.random.key(len(frame)), (x.shape[-1], 8)) * 0.3
        return x @ frame[name]

    def network(x: Any) -> Any:
        for name in ("first", "second", "third", "last"):
            x = jnp.tanh(linear(x, name))
        return x

    def init(x: Any) -> dict[str, Any]:
        frame.clear()
        network(x)
        return dict(frame)

    def apply(params: dict[str, Any], x: Any) -> Any:
        frame.clear()
        frame.update(params)
        return network(x)

    return lambda params, x: (apply(params, x) ** 2).mean(), (init(X), X), False


def equinox() -> tuple[Loss, tuple[Any, ...], bool]:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, "scalar", 16, 2, key=jax.random.key(1))
    return lambda model, x: (jax.vmap(model)(x) ** 2).mean(), (model, X), False


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("library", [linen, nnx, haiku])
def test_gradients_and_state_are_those_of_plain_training(library: Callable[[], Any]) -> None:
    loss, args, has_aux = library()
    checkpointed = checkpoint(loss, budget=0.9)
    found, expected = (jax.jit(jax.grad(fn, has_aux=has_aux))(*args) for fn in (checkpointed, loss))
    assert error(found, expected) <= LIMIT


@pytest.mark.slow
@pytest.mark.guard
def test_equinox_differentiates_its_modules() -> None:
    eqx = pytest.importorskip("equinox")
    loss, args, _ = equinox()
    found, expected = (eqx.filter_jit(eqx.filter_grad(fn))(*args) for fn in (checkpoint(loss, budget=0.9), loss))
    assert error(found, expected) <= LIMIT


@pytest.mark.slow
@pytest.mark.guard
def test_a_module_that_changes_itself_is_trained_as_users_of_nnx_do() -> None:
    """Statistics and random keys are in the user's own module after each step."""
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")

    def loss(model: Any, x: Any) -> Any:
        return (model(x) ** 2).mean()

    def trained(loss: Loss) -> Any:
        model = network_of_nnx()
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any, x: Any) -> Any:
            value, gradients = nnx.value_and_grad(loss)(model, x)
            optimizer.update(model, gradients)
            return value

        values = [step(model, optimizer, X) for _ in range(2)]
        return values, nnx.state(model)

    found, expected = trained(checkpoint(loss, budget=0.9)), trained(loss)
    assert error(found, expected) <= LIMIT
    counts = [v for path, v in nnx.to_flat_state(found[1]) if path[-1] == "count"]
    assert [int(v[...]) for v in counts] == [2]


def test_a_forward_alone_changes_a_module_as_well() -> None:
    nnx = pytest.importorskip("flax.nnx")
    ours, plain = (nnx.BatchNorm(8, rngs=nnx.Rngs(0)) for _ in range(2))
    assert error(checkpoint(lambda model: model(X), budget=1.0)(ours), plain(X)) <= LIMIT
    assert error(ours.mean[...], plain.mean[...]) <= LIMIT
    assert float(abs(ours.mean[...]).max()) > 0


def test_a_module_at_two_places_that_changes_itself_is_refused_with_the_way_out() -> None:
    """Each place would have statistics of its own; ``nnx`` above is what the message says to write."""
    nnx = pytest.importorskip("flax.nnx")
    norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match=r"in place .*that it holds twice.*nnx\.merge\(graph, params, rest, copy=True\)"
    ):
        nnx.grad(checkpoint(lambda both: (both[1](both[0](X)) ** 2).mean(), budget=1.0))([norm, norm])


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
