"""Eight layers learn XOR in JAX, within a budget by XLA's own account: ``python examples/xor_jax.py``.

The data are the four cases of XOR, again and again; the loss is wrapped, the train step fitted, and run.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

import autoremat.jax

WIDTH, LAYERS, ROWS = 32, 8, 1024


def inputs() -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Weights, cases, answers."""
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    sizes = [2, *[WIDTH] * LAYERS, 1]
    weights = [jax.random.normal(k, (a + 1, b)) / jnp.sqrt(a) for k, a, b in zip(keys, sizes, sizes[1:], strict=False)]
    cases = jnp.tile(jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), (ROWS // 4, 1))
    return weights, cases, jnp.logical_xor(cases[:, :1] > 0, cases[:, 1:] > 0).astype(jnp.float32)


def network(weights: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """Numbers above zero mean yes."""
    for k, w in enumerate(weights):
        with jax.named_scope(f"layers.{k}"):
            x = x @ w[:-1] + w[-1]
            x = jnp.tanh(x) if k < len(weights) - 1 else x
    return x


@autoremat.jax.checkpoint(time_limit_seconds=1.0)
def loss(weights: Sequence[jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy."""
    z = network(weights, x)
    return (jax.nn.softplus(z) - y * z).mean()


def train_step(weights: list[jax.Array], x: jax.Array, y: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """One step of gradient descent."""
    value, gradients = jax.value_and_grad(loss)(weights, x, y)
    return [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)], value


def main(steps: int = 500, budget: str = "800KB") -> float:
    """Train, and return the loss of the last step."""
    weights, x, y = inputs()
    step = autoremat.jax.fit(train_step, weights, x, y, budget=budget, donate_argnums=0)
    print(step)
    value = jnp.inf
    for _ in range(steps):
        weights, value = step(weights, x, y)
    right = ((network(weights, x) > 0) == (y > 0)).mean()
    print(f"loss {float(value):.4f}, {float(right):.0%} right")
    return float(value)


if __name__ == "__main__":
    main()
