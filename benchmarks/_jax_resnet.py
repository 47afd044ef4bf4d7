"""A ResNet of Flax Linen: six blocks, batch norm whose statistics come back as an auxiliary output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """Two convolutions beside a way around them."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        y = nn.Conv(self.features, (3, 3), (self.stride, self.stride), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), (self.stride, self.stride), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Six blocks of 16, 32 and 64 features."""

    block: type = Block

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        for features, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            x = self.block(features, stride)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


def inputs() -> tuple[Any, ...]:
    """Parameters, statistics, images, labels."""
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (32, 32, 32, 3)), jax.random.randint(key, (32,), 0, 10)
    known = ResNet().init(key, x)
    return known["params"], known["batch_stats"], x, y


def by_policy(policy: Any) -> type:
    """Blocks under ``nn.remat``, with the names of plain ones."""
    block = nn.remat(Block, static_argnums=(2,), policy=policy)
    block.__name__ = "Block"
    return block


def remat() -> type:
    """Blocks of which nothing is kept."""
    return by_policy(None)


def loss_of(block: type = Block) -> Callable[..., Any]:
    """The loss, and the new statistics."""
    model = ResNet(block)

    def loss(params: Any, stats: Any, x: Any, y: Any) -> Any:
        out, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], -1).mean(), new["batch_stats"]

    return loss
