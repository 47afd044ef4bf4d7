"""A step for every engine, as its contract is tried on: how to run it plainly, what it leaves, what it took."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Numbers = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """A step of one engine.

    Attributes:
        step: of which a part can be computed again.
        other: another step, for which plans of the first one are none.
        plain: runs the step without the engine; returns all numbers that it leaves, by name.
        under: the same with what the engine has made of a plan.
        measured: the peak of such a run in bytes, by an account that is not ours.
        agree: whether two runs have left the same.
    """

    step: Any
    other: Any
    plain: Callable[[], Numbers]
    under: Callable[[Callable[..., Any]], Numbers]
    measured: Callable[[Callable[..., Any]], int]
    agree: Callable[[Numbers, Numbers], bool] = dict.__eq__


def of_numpy() -> Case:
    """A chain of sines and its backward, as lists of calls."""
    import numpy as np

    from autoremat.engines.numpy import Call, Step
    from tests.engines.numpy.meter import Meter

    meter = Meter()

    def seen(*made: Any) -> tuple[Any, ...]:
        meter.look()
        return made

    n = 6
    forward = [Call(f"sin{i}", lambda a: seen(np.sin(a)), (f"h{i}",), (f"h{i + 1}",)) for i in range(n)]
    first = Call("ones", lambda a: seen(np.ones_like(a)), (f"h{n}",), (f"g{n}",), "backward")
    backward = [
        Call(f"cos{i}", lambda g, a: seen(g * np.cos(a)), (f"g{i + 1}", f"h{i}"), (f"g{i}",), "backward")
        for i in reversed(range(n))
    ]
    inputs = {"h0": np.linspace(0.0, 1.0, 64)}
    step = Step("sines", (*forward, first, *backward), inputs)

    def numbers(memory: dict[str, Any]) -> Numbers:
        return {name: array.tobytes() for name, array in memory.items() if name == "g0"}

    def plain() -> Numbers:
        memory = dict(inputs)
        for call in step.calls:
            memory.update(zip(call.writes, call.fn(*[memory[r] for r in call.reads]), strict=True))
        return numbers(memory)

    def measured(run: Callable[..., Any]) -> int:
        # What is in memory during a call: one array of the inputs was there before Python's account began.
        with meter:
            run()
        return meter.peak_bytes + inputs["h0"].nbytes

    return Case(step, Step("fewer", step.calls[:3], inputs), plain, lambda run: numbers(run()), measured)


def of_torch_eager() -> Case:
    """A stack of layers with dropout."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)]
    return _of_torch(nn.Sequential(*layers), lambda loss: loss)


def of_torch_compiled() -> Case:
    """A stack of layers as torch.compile traces it. What dropout makes stays in such a graph: there is but one."""
    import torch
    from torch import nn

    from autoremat.engines.torch.compiled.engine import BACKEND

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(8)]
    return _of_torch(nn.Sequential(*layers, nn.Dropout(0.1)), partial(torch.compile, backend=BACKEND))


def _of_torch(model: Any, plainly: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Case:
    """A step of a model; ``plainly`` makes of its loss what runs without the engine."""
    import torch
    from torch import nn

    from autoremat.engines.engine import Step
    from autoremat.engines.torch.world.memory_account import account, resident

    x, other = torch.randn(256, 32), nn.Sequential(nn.Linear(32, 32), nn.Tanh())

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    def trained(run: Callable[..., Any]) -> Numbers:
        torch.manual_seed(1)
        model.zero_grad()
        result = run()
        result.backward()
        left = {"loss": result, "generator": torch.get_rng_state()}
        left |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: tensor.detach().numpy().tobytes() for name, tensor in left.items()}

    def measured(run: Callable[..., Any]) -> int:
        trained(run)  # the first step is recorded, or compiled
        model.zero_grad()
        return account(lambda: run().backward(), resident(model, x)).peak_bytes

    plain = plainly(loss)
    return Case(Step(loss), Step(lambda: other(x).sum()), lambda: trained(plain), trained, measured)


def of_jax() -> Case:
    """A stack of layers; XLA fuses otherwise under a plan, so gradients are equal to its rounding."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import autoremat.jax
    from autoremat.engines.jax.engine import Step

    keys = jax.random.split(jax.random.key(0), 17)
    weights = [jax.random.normal(k, (32, 32)) / 6 for k in keys[1:]]
    x = jax.random.normal(keys[0], (1024, 32))

    def loss(weights: list[Any], x: Any) -> Any:
        for w in weights:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def compiled(run: Callable[..., Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", autoremat.jax.BarriersRemoved)  # the options below keep them
            lowered = jax.jit(lambda weights, x: run(weights, x)).lower(weights, x)
        return lowered.compile(compiler_options=autoremat.jax.compiler_options())

    def numbers(run: Callable[..., Any]) -> Numbers:
        return {str(k): np.asarray(a).tobytes() for k, a in enumerate(jax.tree.leaves(compiled(run)(weights, x)))}

    def agree(one: Numbers, other: Numbers) -> bool:
        pairs = [(np.frombuffer(one[k], np.float32), np.frombuffer(other[k], np.float32)) for k in one]
        largest = max(np.abs(a).max() for a, _ in pairs[1:])
        return one.keys() == other.keys() and all(np.abs(a - b).max() <= 2e-6 * max(largest, 1.0) for a, b in pairs)

    plain = jax.value_and_grad(loss)
    return Case(
        Step(loss, (weights, x)), Step(lambda w, x: jnp.sum(jnp.sin(x @ w[0])), (weights, x)), lambda: numbers(plain),
        numbers, lambda run: autoremat.jax.memory(compiled(run)).total_bytes, agree,
    )  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {
    "jax": of_jax,
    "numpy": of_numpy,
    "torch.compiled": of_torch_compiled,
    "torch.eager": of_torch_eager,
}
"""By the name of the engine."""
FRAMEWORKS = {"jax": "jax", "torch.compiled": "torch", "torch.eager": "torch"}
"""What an engine needs that may not be installed."""
