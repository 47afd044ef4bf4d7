"""Gradients of checkpointed functions are those of JAX, under every transformation, to 1e-12 in double precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import autoremat.jax as aj  # noqa: E402
from tests.engines.jax.models import QUIET, batch, checkpoint, error, layers, tightest, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings(QUIET)
EXACT = 1e-12
KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


def _both(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(fn, argnums=(0, 1))


def _of_gradients(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ws, x: sum((g**2).sum() for g in jax.grad(fn)(ws, x))


def _along(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ws, x: jax.jvp(lambda w: jax.grad(fn)(w, x), (ws,), (ws,))


def _hessian(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ws, x: jax.hessian(lambda bias: fn(ws, x + bias))(x[0])


def _donated(fn: Callable[..., Any]) -> Callable[..., Any]:
    def step(ws: Any, x: Any) -> Any:
        return jax.tree.map(lambda w, g: w - 0.1 * g, ws, jax.grad(fn)(ws, x))

    return lambda ws, x: jax.jit(step, donate_argnums=0)(jax.tree.map(jnp.copy, ws), x)


def _halves(x: jax.Array) -> jax.Array:
    return x.reshape(2, -1, x.shape[-1])


def _accumulated(fn: Callable[..., Any]) -> Callable[..., Any]:
    def step(ws: Any, x: Any) -> Any:
        def once(total: Any, part: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(fn)(ws, part)), None

        return lax.scan(once, jax.tree.map(jnp.zeros_like, ws), _halves(x))[0]

    return step


def _inside_of_a_scan(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(lambda ws, x: lax.scan(lambda a, part: (a + fn(ws, part), None), 0.0, _halves(x))[0])


def _in_a_mesh(check_vma: bool, fn: Callable[..., Any]) -> Callable[..., Any]:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def shard(ws: Any, x: Any) -> Any:
        return jax.tree.map(lambda g: lax.pmean(g, "d"), jax.grad(fn)(ws, x))

    return jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma)


TRANSFORMS: dict[str, Transform] = {
    "grad": jax.grad,
    "forward only": lambda fn: fn,
    "both arguments": _both,
    "value and grad": jax.value_and_grad,
    "vmap of grad": lambda fn: lambda ws, x: jax.vmap(jax.grad(fn), (None, 0))(ws, _halves(x)),
    "grad of vmap": lambda fn: jax.grad(lambda ws, x: jax.vmap(fn, (None, 0))(ws, _halves(x)).sum()),
    "grad of grad": lambda fn: jax.grad(_of_gradients(fn)),
    "forward over reverse": _along,
    "hessian": _hessian,
    "donated": _donated,
    "accumulated in a scan": _accumulated,
    "inside of a scan": _inside_of_a_scan,
    "shard_map": functools.partial(_in_a_mesh, True),
    "shard_map unchecked": functools.partial(_in_a_mesh, False),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_under_every_transformation(name: str) -> None:
    ws, x = weights(2), batch()
    checkpointed = checkpoint(layers, budget=0.85)
    found, expected = (jax.jit(TRANSFORMS[name](fn))(ws, x) for fn in (checkpointed, layers))
    assert error(found, expected) <= EXACT


def test_without_jit() -> None:
    w = weights(1)[0]

    def fn(w: Any) -> Any:
        return jnp.sin(jnp.sin(w)).sum()

    assert error(jax.grad(tightest(fn, w))(w), jax.grad(fn)(w)) <= EXACT


# ---- what is inside --------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _doubled(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


_doubled.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * 2.0,))


def _custom_reverse(ws: Any, x: Any) -> Any:
    for w in ws:
        x = _doubled(x @ w)
    return (x**2).mean()


def _custom_forward(ws: Any, x: Any) -> Any:
    for w in ws:
        x = jax.nn.relu(jax.nn.silu(x @ w)) + jax.scipy.special.logsumexp(x)
    return (x**2).mean()


def _by_hand(ws: Any, x: Any) -> Any:
    for w in ws:
        x = jax.checkpoint(lambda x, w: x + jnp.sin(x @ w))(x, w)
    return (x**2).mean()


def _with_jit(ws: Any, x: Any) -> Any:
    layer = jax.jit(lambda x, w: x + jnp.sin(x @ w))
    for w in ws:
        x = layer(x, w)
    return (x**2).mean()


def _while_stopped(ws: Any, x: Any) -> Any:
    def more(c: Any) -> Any:
        return c[0] + 1, c[1] * 0.5

    return layers(ws, lax.while_loop(lambda c: c[0] < 3, more, (0, lax.stop_gradient(x)))[1])


def _fixed_loop(ws: Any, x: Any) -> Any:
    return layers(ws, lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ ws[0]), x))


def _cond(ws: Any, x: Any) -> Any:
    return layers(ws, lax.cond(x.sum() > 0, lambda x: jnp.sin(x @ ws[0]), lambda x: x, x))


def _callback(ws: Any, x: Any) -> Any:
    kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return layers(ws, jax.pure_callback(lambda a: np.asarray(a) * 2, kind, lax.stop_gradient(x)))


def _complex(ws: Any, x: Any) -> Any:
    return jnp.abs(jnp.fft.fft(layers(ws, x) * x.astype(jnp.complex128))).sum()


def _dropout(ws: Any, x: Any) -> Any:
    key = jax.random.key(3)
    for w in ws:
        key, mine = jax.random.split(key)
        x = jnp.where(jax.random.bernoulli(mine, 0.7, x.shape), jnp.sin(x @ w), 0.0)
    return (x**2).mean()


def _closed_over_key(ws: Any, x: Any) -> Any:
    for k, w in enumerate(ws):
        x = jnp.sin(x @ w) * jax.random.bernoulli(jax.random.fold_in(KEY, k), 0.7, x.shape)
    return (x**2).mean()


def _old_keys(ws: Any, x: Any) -> Any:
    return layers(ws, x * jax.random.bernoulli(jax.random.PRNGKey(3), 0.7, x.shape))


INSIDE = [
    _custom_reverse, _custom_forward, _by_hand, _with_jit, _while_stopped, _fixed_loop, _cond, _callback, _complex,
    _dropout, _closed_over_key, _old_keys,
]  # fmt: skip


@pytest.mark.parametrize("fn", INSIDE, ids=lambda fn: fn.__name__.strip("_"))
def test_whatever_is_inside(fn: Callable[..., Any]) -> None:
    ws, x = weights(2), batch()
    found, expected = (jax.jit(jax.grad(f))(ws, x) for f in (tightest(fn, ws, x), fn))
    assert error(found, expected) <= EXACT


def test_a_rule_that_lies_is_believed() -> None:
    """The gradient that a user has written down is the one that counts."""
    x = batch()
    found = jax.grad(checkpoint(lambda x: _doubled(x).sum(), budget=1.0))(x)
    assert np.array_equal(found, np.full(x.shape, 2.0))


def test_second_derivatives_find_custom_rules() -> None:
    """At zero relu's rule says 0 where the maximum of two numbers says a half."""

    def fn(x: jax.Array) -> jax.Array:
        return (jax.nn.relu(x) ** 3 + x * jax.nn.relu(x)).sum()

    x = jnp.array([0.0, 1.0, -1.0])
    second = jax.grad(lambda x: jax.grad(checkpoint(fn, budget=1.0))(x).sum())(x)
    assert np.array_equal(second, jax.grad(lambda x: jax.grad(fn)(x).sum())(x))


# ---- arguments and results -------------------------------------------------------------------------------------------


def test_auxiliary_outputs_of_all_kinds_come_back() -> None:
    def fn(ws: Any, x: Any) -> Any:
        return layers(ws, x), {"int": jnp.arange(3), "array": x @ ws[0], "number": 3, "text": "seen", "none": None}

    ws, x = weights(2), batch()
    found = jax.grad(checkpoint(fn, budget=0.8), has_aux=True)(ws, x)
    expected = jax.grad(fn, has_aux=True)(ws, x)
    assert found[1]["text"] == "seen"
    assert found[1]["number"] == 3
    assert type(found[1]["number"]) is int
    for one in (found, expected):
        one[1].pop("text")
    assert error(found, expected) <= EXACT


def test_what_is_closed_over_has_a_gradient() -> None:
    ws, x = weights(2), batch()

    def step(scale: jax.Array) -> Any:
        return checkpoint(lambda ws: layers(ws, x * scale), budget=1.0)(ws)

    expected = jax.grad(lambda scale: layers(ws, x * scale))(2.0)
    assert error(jax.grad(step)(2.0), expected) <= EXACT


def test_python_arguments_stay_what_they_are() -> None:
    def fn(ws: Any, x: Any, power: int, *, flag: bool, name: str) -> Any:
        assert (type(power), type(flag), name) == (int, bool, "me")
        return layers(ws, x) ** power if flag else x.sum()

    ws, x = weights(2), batch()
    found = jax.grad(checkpoint(fn, budget=1.0))(ws, x, 2, flag=True, name="me")
    assert error(found, jax.grad(fn)(ws, x, 2, flag=True, name="me")) <= EXACT


def test_static_arguments_are_handed_on() -> None:
    class Settings:
        n = 2

    def fn(settings: Settings, ws: Any, x: Any) -> Any:
        return layers(ws[: settings.n], x)

    ws, x = weights(3), batch()
    found = jax.grad(checkpoint(fn, budget=1.0, static_argnums=0), argnums=1)(Settings(), ws, x)
    assert error(found, jax.grad(fn, argnums=1)(Settings(), ws, x)) <= EXACT


def test_only_what_is_asked_for_is_differentiated() -> None:
    """The gradient of the batch is neither planned nor computed."""
    ws, x = weights(2), batch()
    plan = aj.plan(layers, ws, x, budget=1.0)
    assert [v.label.split()[2] for v in plan.program.values if v.kind == "gradient"] == ["ws[0]", "ws[1]"]


def test_integers_and_arrays_without_numbers_are_arguments() -> None:
    def fn(ws: Any, index: Any, empty: Any) -> Any:
        return layers(ws, batch()[index]) + empty.sum()

    ws, index, empty = weights(2), jnp.arange(5), jnp.zeros((0, 3))
    found, expected = (jax.jit(jax.grad(f))(ws, index, empty) for f in (tightest(fn, ws, index, empty), fn))
    assert error(found, expected) <= EXACT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_less_precision_to_the_rounding_of_the_compiler(dtype: str) -> None:
    ws, x = weights(2, dtype), batch(dtype)
    limit = 2e-6 if dtype == "float32" else 2e-2
    found, expected = (jax.jit(jax.grad(f))(ws, x) for f in (tightest(layers, ws, x), layers))
    assert error(found, expected) <= limit
