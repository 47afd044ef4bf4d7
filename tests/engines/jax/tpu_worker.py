"""Steps compiled for a TPU that is not there, as test_tpu.py starts them; writes bytes and FLOPs as JSON.

``libtpu`` compiles ahead of time, for a chip by its name. It must be alone in its process.
"""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import autoremat.jax as aj
from autoremat.program import simulate
from tests.engines.jax.models import block, gpt, gpt_parameters, tokens

CHIP = "v5e:2x2"
SHARES = (0.5, 0.25)


def compiled(fn: Callable[..., Any], args: Any) -> dict[str, float]:
    """Peak beside arguments and outputs, and FLOPs, of the gradient, by XLA for TPU."""
    step = jax.jit(jax.grad(fn)).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    account, costs = step.memory_analysis(), step.cost_analysis()
    beside = account.peak_memory_in_bytes - account.argument_size_in_bytes - account.output_size_in_bytes
    return {"bytes": beside, "flops": costs["flops"]}


def shapes_on_a_chip(args: Any) -> Any:
    """The arguments as shapes on the first chip of the topology."""
    topology = topologies.get_topology_desc(CHIP, platform="tpu")
    where = NamedSharding(Mesh(np.array(topology.devices[:1]), ("chip",)), PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args)


def main() -> None:
    """Compile a GPT plainly, with ``jax.checkpoint`` around every block, and with autoremat."""
    warnings.simplefilter("ignore", aj.BarriersRemoved)  # they are, on this machine's CPU
    args = shapes_on_a_chip((gpt_parameters(4, 128, 512, 128), tokens(8, 128, 512)))
    plan = aj.plan(gpt, *args, budget=1.0)
    program = plan.program
    beside = simulate(program).peak_bytes - program.fixed_bytes
    found = {"plain": compiled(gpt, args)}
    by_block = functools.partial(gpt, block=jax.checkpoint(block))
    found["jax.checkpoint"] = compiled(by_block, args)
    budgets = {str(share): program.fixed_bytes + int(share * beside) for share in SHARES}
    for name, budget in (budgets | {"floor": plan.floor_bytes}).items():
        found[name] = compiled(aj.checkpoint(gpt, budget=budget), args)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
