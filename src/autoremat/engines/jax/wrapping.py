"""The function that stands in the place of a checkpointed one: JAX differentiates it by our rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import register_dataclass

from autoremat.engines.jax import core
from autoremat.engines.jax.arguments import Arguments, Results
from autoremat.engines.jax.compiler import warn_of_removed_barriers
from autoremat.engines.jax.facts import is_inexact, unplannable_effects
from autoremat.engines.jax.graph import jaxpr_of
from autoremat.engines.jax.lowering import Lowered
from autoremat.engines.jax.planning import Asked, is_fitting, planned
from autoremat.engines.jax.recording import Names
from autoremat.engines.jax.variants import Variants

F = TypeVar("F", bound=Callable[..., Any])


@functools.partial(register_dataclass, data_fields=["passed", "kept"], meta_fields=["lowered"])
@dataclass(frozen=True, eq=False)
class Saved:
    """What goes from the forward to the backward."""

    passed: Sequence[Any]
    kept: Sequence[Any]
    lowered: Lowered


@dataclass(frozen=True, eq=False)
class Traced:
    """A call of a user's function, traced: what it closes over is an argument like the others.

    Attributes:
        closed: all arrays to all results, as a jaxpr without constants.
        arrays: what to call it with.
        positions: of the argument that each of the last arrays belongs to; those before are closed over.
        names: of arrays and results.
        arguments: of the user.
        results: puts results together.
    """

    closed: Any
    arrays: list[Any]
    positions: tuple[int, ...]
    names: Names
    arguments: Arguments
    results: Results


def trace(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], static: Sequence[int] = ()) -> Traced:
    """Trace a call.

    Raises:
        ValueError: the function has an effect that no plan can keep in its place.
        TypeError: it changes one of its arguments.
    """
    arguments, results = Arguments.of(fn, args, kwargs, static), Results()
    closed = jax.make_jaxpr(lambda *arrays: results.take(*arguments.call(fn, arrays)))(*arguments.arrays)
    name = getattr(fn, "__name__", type(fn).__name__)
    if effects := unplannable_effects(closed.effects):
        raise ValueError(
            f"{name} has an effect ({', '.join(map(_effect_text, effects))}), such as jax.debug.print or an ordered "
            "callback: what is computed again would have it twice, or not at all. Take it out of the checkpointed "
            "function, or return what it needs as an auxiliary output and have the effect outside"
        )
    n = len(closed.consts)
    names = Names(name, (*(f"constant {k}" for k in range(n)), *arguments.array_paths), results.paths)
    return Traced(
        _without_constants(closed), [*closed.consts, *arguments.arrays], arguments.array_positions, names, arguments,
        results,
    )  # fmt: skip


def _effect_text(effect: Any) -> str:
    """The name of an effect; that of its type where it says nothing of itself but where it is in memory."""
    text = str(effect)
    return type(effect).__name__ if " object at 0x" in text else text


def _without_constants(closed: Any) -> Any:
    """The same with its constants as the first arguments."""
    jaxpr = closed.jaxpr
    invars = (*jaxpr.constvars, *jaxpr.invars)
    return core.ClosedJaxpr(jaxpr_of(invars, jaxpr.outvars, jaxpr.eqns, jaxpr.effects), ())


def checkpointed(fn: F, asked: Asked, static: Sequence[int] = ()) -> F:
    """The function with a gradient of our own."""

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        traced = trace(fn, args, kwargs, static)
        try:
            outs = _with_own_gradient(traced.closed, traced.names, asked)(*traced.arrays)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            raise TypeError(_NO_FORWARD_MODE.format(traced.names.step)) from error
        traced.arguments.update(traced.results.changes(outs))
        return traced.results.put(outs)

    wrapped.__wrapped_by_autoremat__ = fn  # type: ignore[attr-defined]
    return wrapped  # type: ignore[return-value]


_NO_FORWARD_MODE = (
    "{0} is checkpointed, and JAX differentiates it in forward mode (jvp, jacfwd, linearize): what is kept for the "
    "backward has no meaning there. Use the function without autoremat.jax.checkpoint for that; the forward mode of "
    "its gradient (a Hessian-vector product by jvp of grad) works"
)


def _with_own_gradient(closed: Any, names: Names, asked: Asked) -> Any:
    """``custom_vjp`` of a flat function: planned when JAX tells which arguments are differentiated."""

    def forward(*primals: Any) -> tuple[list[Any], Saved]:
        values = [p.value for p in primals]
        is_differentiated = [p.perturbed and is_inexact(p.value) for p in primals]
        lowered = lowered_for(closed, [jax.typeof(v) for v in values], is_differentiated, names, asked)
        outs, passed, kept = lowered.forward(values)
        return outs, Saved(passed, kept, lowered)

    def backward(saved: Saved, cotangents: Sequence[Any]) -> tuple[Any, ...]:
        recorded = saved.lowered.recorded
        given = [_full(c) for c, takes in zip(cotangents, recorded.takes_cotangent, strict=True) if takes]
        gradients = iter(saved.lowered.backward(saved.passed, saved.kept, given))
        return tuple(next(gradients) if d else None for d in recorded.is_differentiated)

    rule = jax.custom_vjp(lambda *arrays: list(jax.core.eval_jaxpr(closed.jaxpr, (), *arrays)))
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return rule


def _full(cotangent: Any) -> Any:
    """A cotangent as an array."""
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    return jnp.zeros(cotangent.aval.shape, cotangent.aval.dtype)


def lowered_for(
    closed: Any, avals: Sequence[Any], is_differentiated: Sequence[bool], names: Names, asked: Asked
) -> Lowered:
    """Record, plan, and make ready to run."""
    found = planned(Variants(closed, avals, is_differentiated, names), asked)
    lowered = Lowered(found.recorded, found.plan.schedule)
    if lowered.n_fences and not is_fitting():
        warn_of_removed_barriers()
    return lowered
