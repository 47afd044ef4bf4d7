"""Checkpointed steps on four devices, as test_devices.py starts them; writes what it finds to standard output as JSON.

The number of devices is fixed when JAX starts, so this is a process of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import autoremat.jax as aj
from tests.engines.jax.models import BRIEF, OPTIONS, checkpoint, error, tightest
from tests.fixed import fixed_planning

warnings.simplefilter("ignore", aj.BarriersRemoved)
warnings.simplefilter("ignore", DeprecationWarning)  # of pmap
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)
N = 4
WIDTH, ROWS = 16, 256


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((N,), ("d",), axis_types=(kind,))


def inputs(n: int = 6) -> tuple[list[jax.Array], jax.Array]:
    keys = jax.random.split(jax.random.key(0), n + 1)
    return [jax.random.normal(k, (WIDTH, WIDTH)) * 0.4 for k in keys[:n]], jax.random.normal(keys[n], (ROWS, WIDTH))


def network(ws: Any, x: Any) -> Any:
    for w in ws:
        x = jnp.tanh(x @ w)
    return (x**2).mean()


def communicating(ws: Any, x: Any) -> Any:
    """Its forward needs all devices at every layer."""
    for w in ws:
        x = jnp.tanh(x @ w - lax.pmean(x.mean(), "d"))
    return lax.pmean((x**2).mean(), "d")


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.jit(fn).lower(*args).compile(compiler_options=OPTIONS)


def collectives(step: Any) -> int:
    return int(step.as_text().count(" all-reduce("))


def beside_plain(of: Callable[[Callable[..., Any]], Callable[..., Any]], fn: Any, tight: Any, *args: Any) -> Any:
    """What one device takes and how often devices talk, plain and checkpointed; how far gradients are apart."""
    plain, ours = (compiled(of(f), *args) for f in (fn, tight))
    return {
        "error": error(ours(*args), plain(*args)),
        "bytes": [aj.memory(step).temporaries_bytes for step in (plain, ours)],
        "collectives": [collectives(step) for step in (plain, ours)],
    }


def in_shards(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients for one part of the batch each, averaged."""

    def shard(ws: Any, x: Any) -> Any:
        return jax.tree.map(lambda g: lax.pmean(g, "d"), jax.grad(fn)(ws, x))

    return jax.shard_map(shard, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P(), check_vma=False)


def shard_map() -> Any:
    """The budget is one of a shard: the plan of a quarter of the batch alone says what it is."""
    ws, x = inputs()
    part = x[: ROWS // N]
    tight = tightest(network, ws, part)
    found = beside_plain(in_shards, network, tight, ws, x)
    found["against one device"] = error(jax.jit(in_shards(tight))(ws, x), jax.jit(jax.grad(network))(ws, x))
    return found


def shard_map_that_communicates() -> Any:
    """Whatever a plan computes again, devices talk no more often than in plain training."""
    ws, x = inputs()
    return beside_plain(in_shards, communicating, checkpoint(communicating, budget=0.7), ws, x)


def around_a_shard_map() -> Any:
    """The loss has the mesh inside."""

    def loss(ws: Any, x: Any) -> Any:
        return jax.shard_map(communicating, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P())(ws, x)

    ws, x = inputs(2)
    return beside_plain(jax.grad, loss, checkpoint(loss, budget=1.0), ws, x)


def sharded(kind: AxisType, of_weights: P, of_batch: P) -> Any:
    """``jit`` with sharded arguments: the plan is one of the whole arrays."""
    ws, x = inputs()
    here, floor = mesh(kind), aj.plan(network, ws, x, budget=1.0, time_limit_seconds=BRIEF).floor_bytes
    tight = checkpoint(network, budget=int(1.02 * floor))  # a number more or less, with types that are sharded
    placed = jax.device_put(ws, NamedSharding(here, of_weights)), jax.device_put(x, NamedSharding(here, of_batch))
    found = beside_plain(jax.grad, network, tight, *placed)
    found["against one device"] = error(jax.jit(jax.grad(tight))(*placed), jax.jit(jax.grad(network))(ws, x))
    return found


def fitted() -> Any:
    """The budget of ``fit`` is one of each device."""
    ws, x = inputs()
    here = mesh()
    args = jax.device_put(ws, NamedSharding(here, P())), jax.device_put(x, NamedSharding(here, P("d")))

    def step_of(loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda ws, x: [w - 0.1 * g for w, g in zip(ws, jax.grad(loss)(ws, x), strict=True)]

    plain = compiled(step_of(network), *args)
    budget = int(0.85 * aj.memory(plain).total_bytes)
    step = aj.fit(step_of(checkpoint(network)), *args, budget=budget)
    return {
        "budget": budget, "total": step.memory.total_bytes, "tries": len(step.tries),
        "arguments": step.memory.arguments_bytes, "batch": x.nbytes, "error": error(step(*args), plain(*args)),
    }  # fmt: skip


def pmap() -> Any:
    ws, x = inputs(2)
    parts = x.reshape(N, -1, WIDTH)
    tight = tightest(network, ws, parts[0])
    found, expected = (jax.pmap(jax.grad(fn), in_axes=(None, 0))(ws, parts) for fn in (tight, network))
    return {"error": error(found, expected)}


CASES: dict[str, Callable[[], Any]] = {
    "shard_map": shard_map,
    "shard_map that communicates": shard_map_that_communicates,
    "around a shard_map": around_a_shard_map,
    "batch": lambda: sharded(AxisType.Auto, P(), P("d")),
    "weights": lambda: sharded(AxisType.Auto, P(None, "d"), P()),
    "batch, explicit": lambda: sharded(AxisType.Explicit, P(), P("d")),
    "fit": fitted,
    "pmap": pmap,
}


def main(names: list[str]) -> None:
    results: dict[str, Any] = {"devices": jax.device_count()}
    for name in names or CASES:
        with fixed_planning():
            results[name] = CASES[name]()
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
