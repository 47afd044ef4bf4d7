"""autoremat.jax beside ``jax.checkpoint``: bytes and FLOPs by XLA's own account.

    python benchmarks/jax_remat.py [gpt] [scan] [resnet] [recurrence] [fit]

Temporaries are ``temp_size_in_bytes``, FLOPs those of ``cost_analysis()``, which counts the body of a loop once: for
scans it says nothing of what is computed again. On CPU barriers are kept (docs/measuring-on-cpu.md), but for the
recurrence, which needs no option. Plans are limited by effort, not by time. Errors are relative to the largest number
of all gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import autoremat.jax as aj
from autoremat.engines.jax.compiler import flops
from autoremat.planner import clock
from tests.engines.jax.models import (
    MIB,
    block,
    cell,
    error,
    gpt,
    gpt_parameters,
    recurrence,
    recurrence_parameters,
    scanned_gpt,
    stacked,
    tokens,
)

Variants = Iterator[tuple[str, Callable[..., Any]]]
POLICIES = ("dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")


def policy(name: str) -> Any:
    """One of the policies of ``jax.checkpoint``."""
    return getattr(jax.checkpoint_policies, name)


def by_shares(fn: Callable[..., Any], args: Any, shares: tuple[float, ...]) -> Variants:
    """Plans for shares of what the plain step takes beside what is fixed."""
    plan = aj.plan(fn, *args, budget=1.0)
    fixed = plan.program.fixed_bytes
    for share in shares:
        budget = fixed + int(share * (plan.plain_peak_bytes - fixed))
        yield f"autoremat, {share:.2f} of it", aj.checkpoint(fn, budget=budget)


def by_bytes(fn: Callable[..., Any], args: Any, sizes: tuple[float, ...]) -> Variants:
    """Plans for so many MiB beside what is fixed."""
    fixed = aj.plan(fn, *args, budget=1.0).program.fixed_bytes
    for mib in sizes:
        yield f"autoremat, {mib} MiB", aj.checkpoint(fn, budget=fixed + int(mib * MIB))


def table(title: str, variants: Variants, args: Any, options: dict[str, Any], *, has_aux: bool = False) -> None:
    """Print a line for each variant; the first one is plain."""
    print(f"\n{title}\n{'variant':44} {'temporaries':>11} {'FLOPs':>7} {'error':>8}")
    first: tuple[Any, float] | None = None
    for name, fn in variants:
        compiled = jax.jit(jax.grad(fn, has_aux=has_aux)).lower(*args).compile(compiler_options=options or None)
        found = compiled(*args)
        first = first or (found, flops(compiled))
        size = aj.memory(compiled).temporaries_bytes / MIB
        ratio, off = flops(compiled) / first[1], error(found, first[0])
        print(f"{name:44} {size:7.2f} MiB {ratio:7.3f} {off:8.1e}", flush=True)


def of_blocks(fn: Callable[..., Any], layer: Callable[..., Any], **more: Any) -> Variants:
    """Plain, ``jax.checkpoint`` of every block, and with the policies that people use."""
    yield "plain", fn
    yield "jax.checkpoint(block)", lambda p, x: fn(p, x, jax.checkpoint(layer, **more))
    for name in POLICIES:
        yield f"blocks, {name}", lambda p, x, n=name: fn(p, x, jax.checkpoint(layer, policy=policy(n), **more))
    yield "whole function, nothing_saveable", jax.checkpoint(fn, policy=policy("nothing_saveable"))


def run_gpt() -> None:
    """Layers one after the other in a Python loop."""
    args = gpt_parameters(6, 128, 512, 128), tokens(8, 128, 512)

    def variants() -> Variants:
        yield from of_blocks(gpt, block)
        yield from by_shares(gpt, args, (0.7, 0.5, 0.35, 0.25, 0.15))

    table("GPT, 6 layers, width 128, 8 x 128 tokens", variants(), args, aj.compiler_options())


def run_scan() -> None:
    """The same layers in a scan."""
    args = stacked(gpt_parameters(12, 128, 512, 128)), tokens(8, 128, 512)

    def variants() -> Variants:
        yield from of_blocks(scanned_gpt, block, prevent_cse=False)
        yield from by_bytes(scanned_gpt, args, (400, 120, 80, 60, 40))

    table("GPT, scan over 12 layers of the same size", variants(), args, aj.compiler_options())


def run_recurrence() -> None:
    """A long scan of small steps."""
    args = recurrence_parameters(64), jax.random.normal(jax.random.key(1), (1024, 32, 64))

    def by_hand(p: Any, xs: Any, size: int = 32) -> Any:
        def step(h: Any, x: Any) -> Any:
            return jax.checkpoint(cell, prevent_cse=False)(p, h, x), None

        segment = jax.checkpoint(lambda h, x: jax.lax.scan(step, h, x), prevent_cse=False)
        h, _ = jax.lax.scan(segment, jnp.zeros(xs.shape[1:]), xs.reshape(size, -1, *xs.shape[1:]))
        return (h**2).mean()

    def variants() -> Variants:
        yield from of_blocks(recurrence, cell, prevent_cse=False)
        yield "scan of scans 32 x 32 by hand", by_hand
        yield from by_bytes(recurrence, args, (20, 10, 4, 1.2, 1))

    table("recurrence of 1024 steps, default options", variants(), args, {})


def run_resnet() -> None:
    """Convolutions and batch norm."""
    from benchmarks._jax_resnet import by_policy, inputs, loss_of, remat

    args = inputs()
    plain = loss_of()

    def variants() -> Variants:
        yield "plain", plain
        yield "nn.remat(Block)", loss_of(remat())
        for name in POLICIES:
            yield f"blocks, {name}", loss_of(by_policy(policy(name)))
        yield "whole function, nothing_saveable", jax.checkpoint(plain, policy=policy("nothing_saveable"))
        yield from by_shares(plain, args, (0.7, 0.5, 0.35, 0.25, 0.2))

    title = "ResNet (Flax Linen), 6 blocks with batch norm, 32 x 32 x 32 x 3"
    table(title, variants(), args, aj.compiler_options(), has_aux=True)


def run_fit() -> None:
    """Whole train steps with Adam, within budgets by XLA's account."""
    import optax

    optimizer = optax.adam(1e-3)

    def step_of(loss: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(parameters: Any, state: Any, batch: Any) -> Any:
            value, gradients = jax.value_and_grad(loss)(parameters, batch)
            updates, state = optimizer.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state, value

        return train_step

    batch = tokens(8, 128, 512)
    unrolled, stack = gpt_parameters(6, 128, 512, 128), stacked(gpt_parameters(12, 128, 512, 128))
    for fn, parameters, budgets in (
        (gpt, unrolled, (110, 80, 60, 50, 45)),
        (scanned_gpt, stack, (250, 150, 120, 100, 90)),
    ):
        args = parameters, optimizer.init(parameters), batch
        step = jax.jit(step_of(lambda p, b, fn=fn: fn(p, b, jax.checkpoint(block))), donate_argnums=(0, 1))
        compiled = step.lower(*args).compile(compiler_options=aj.compiler_options())
        print(f"\n{fn.__name__}: jax.checkpoint(block) {aj.memory(compiled).total_bytes / MIB:.2f} MiB in all")
        for budget in budgets:
            fitted = aj.fit(step_of(aj.checkpoint(fn)), *args, budget=budget * MIB, donate_argnums=(0, 1))
            print(f"budget {budget} MiB: {fitted.memory.total_bytes / MIB:.2f} MiB\n{fitted}", flush=True)


PARTS = {"gpt": run_gpt, "scan": run_scan, "resnet": run_resnet, "recurrence": run_recurrence, "fit": run_fit}


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", aj.BarriersRemoved)
    clock.now = lambda: 0.0  # no plan is cut short because the machine is busy; its effort is the same
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
