"""Small functions to differentiate, and how gradients are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import autoremat.jax as aj

QUIET = "ignore:XLA for cpu takes away:UserWarning"
"""Gradients are the same whatever the compiler does to barriers."""
OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""With these XLA for CPU keeps barriers, and memory is saved."""
MIB = 2**20
BRIEF = 0.2
"""Seconds for a plan where any plan will do, as for whoever compares gradients."""
checkpoint = functools.partial(aj.checkpoint, time_limit_seconds=BRIEF)


def weights(n: int = 4, dtype: Any = jnp.float64) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), n)
    return [jax.random.normal(k, (16, 16), dtype) * 0.3 for k in keys]


def batch(dtype: Any = jnp.float64) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (64, 16), dtype)


def layers(ws: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    for w in ws:
        x = x + jax.nn.gelu(x @ w)
    return (x**2).mean()


def error(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number of the whole tree."""
    pairs = zip(map(numbers, jax.tree.leaves(found)), map(numbers, jax.tree.leaves(expected)), strict=True)
    pairs = list(pairs)
    largest = max(float(np.abs(b).max(initial=0)) for _, b in pairs)
    return max(float(np.abs(a - b).max(initial=0)) for a, b in pairs) / (largest or 1.0)


def numbers(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def tightest(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The function with the smallest plan there is for its gradient, so that as much as possible runs again."""
    plan = aj.plan(fn, *args, budget=1.0, time_limit_seconds=BRIEF, **options)
    return checkpoint(fn, budget=plan.floor_bytes)


# ---- a GPT -----------------------------------------------------------------------------------------------------------


def gpt_parameters(n: int, width: int, vocabulary: int, length: int) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 6 * n + 2))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * 0.02

    def layer() -> dict[str, jax.Array]:
        matrices = {"qkv": normal(width, 3 * width), "o": normal(width, width)}
        matrices |= {"w1": normal(width, 4 * width), "w2": normal(4 * width, width)}
        return matrices | {"g1": jnp.ones(width), "g2": jnp.ones(width)}

    return {"emb": normal(vocabulary, width), "pos": normal(length, width), "layers": [layer() for _ in range(n)],
            "gf": jnp.ones(width)}  # fmt: skip


def stacked(parameters: dict[str, Any]) -> dict[str, Any]:
    return parameters | {"layers": jax.tree.map(lambda *a: jnp.stack(a), *parameters["layers"])}


def tokens(size: int, length: int, vocabulary: int) -> dict[str, jax.Array]:
    made = jax.random.randint(jax.random.key(1), (size, length), 0, vocabulary)
    return {"x": made, "y": made}


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * gain


def block(x: jax.Array, p: dict[str, jax.Array], n_heads: int = 4) -> jax.Array:
    size, length, width = x.shape
    q, k, v = (
        part.reshape(size, length, n_heads, width // n_heads) for part in jnp.split(norm(x, p["g1"]) @ p["qkv"], 3, -1)
    )
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(width // n_heads).astype(np.float32)
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v).reshape(size, length, width)
    x = x + mixed @ p["o"]
    return x + jax.nn.gelu(norm(x, p["g2"]) @ p["w1"]) @ p["w2"]


def head(p: dict[str, Any], x: jax.Array, y: jax.Array) -> jax.Array:
    found = jax.nn.log_softmax(norm(x, p["gf"]) @ p["emb"].T)
    return -jnp.take_along_axis(found, y[..., None], -1).mean()


def gpt(p: dict[str, Any], batch: dict[str, jax.Array], block: Callable[..., jax.Array] = block) -> jax.Array:
    x = p["emb"][batch["x"]] + p["pos"]
    for k, layer in enumerate(p["layers"]):
        with jax.named_scope(f"layers.{k}"):
            x = block(x, layer)
    return head(p, x, batch["y"])


def scanned_gpt(p: dict[str, Any], batch: dict[str, jax.Array], block: Callable[..., jax.Array] = block) -> jax.Array:
    x = p["emb"][batch["x"]] + p["pos"]
    x, _ = lax.scan(lambda x, layer: (block(x, layer), None), x, p["layers"])
    return head(p, x, batch["y"])


# ---- a recurrence ----------------------------------------------------------------------------------------------------


def recurrence_parameters(width: int) -> dict[str, jax.Array]:
    first, second = jax.random.split(jax.random.key(0))
    w, u = (jax.random.normal(k, (width, width)) * 0.08 for k in (first, second))
    return {"w": w, "u": u, "b": jnp.zeros(width)}


def cell(p: dict[str, jax.Array], h: jax.Array, x: jax.Array) -> jax.Array:
    return h * 0.9 + jnp.tanh(h @ p["w"] + x @ p["u"] + p["b"]) * 0.1


def recurrence(
    p: dict[str, jax.Array], xs: jax.Array, cell: Callable[..., jax.Array] = cell, unroll: int | bool = 1
) -> jax.Array:
    h, _ = lax.scan(lambda h, x: (cell(p, h, x), None), jnp.zeros(xs.shape[1:], xs.dtype), xs, unroll=unroll)
    return (h**2).mean()
