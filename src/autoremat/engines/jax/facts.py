"""What is known of an equation: its bytes, FLOPs and seconds, how XLA fuses it, and whether it may run again.

Nothing here goes by the name of a primitive. What an equation does is found out by asking for its properties: whether it
can be applied to single numbers, what XLA counts for it, what its types and parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import jax
import numpy as np
from jax.extend import core

from autoremat.engines.jax.graph import CALLS, Equation, graph_of
from autoremat.program import Once

_LAUNCH_SECONDS: Final = 2e-6
_REDUCED_FLOPS: Final = 1.5
"""FLOPs for each number read, up to which what makes one number out of many is a plain reduction."""


class Kind(Enum):
    """How XLA's fusion treats an equation."""

    POINTWISE = "each number of the result from the numbers at the same place"
    LAYOUT = "the same numbers, elsewhere or more often"
    REDUCTION = "fewer numbers than it reads, each read once"
    OTHER = "runs by itself"


@dataclass(frozen=True)
class Facts:
    """What is known of one kind of equation.

    Attributes:
        kind: for fusion.
        flops: floating-point operations.
        once: why it must not run again; None when it may.
    """

    kind: Kind
    flops: float
    once: Once | None = None


@dataclass(frozen=True)
class Machine:
    """What one device can do in a second, roughly: ratios decide plans."""

    flops: float
    bytes_moved: float

    def seconds(self, flops: float, nbytes: int) -> float:
        """Seconds of one fused kernel."""
        return max(flops / self.flops, nbytes / self.bytes_moved) + _LAUNCH_SECONDS


MACHINES: Final = {
    "cpu": Machine(60e9, 12e9),
    "gpu": Machine(150e12, 1.5e12),
    "tpu": Machine(150e12, 0.8e12),
}
"""By platform, as JAX calls it."""


def machine() -> Machine:
    """The kind of device that JAX uses."""
    return MACHINES.get(jax.default_backend(), MACHINES["gpu"])


def nbytes(aval: Any) -> int:
    """Bytes of an array of this type and shape; of a random key those of its words."""
    if not hasattr(aval, "shape"):
        return 0
    return math.prod(aval.shape) * int(getattr(aval.dtype, "itemsize", 0))


def elements(aval: Any) -> int:
    """Numbers in an array of this shape."""
    return math.prod(getattr(aval, "shape", ()))


def is_inexact(aval: Any) -> bool:
    """Whether a gradient with respect to it makes sense."""
    return bool(jax.dtypes.issubdtype(aval.dtype, np.inexact))


def abstract(aval: Any) -> jax.ShapeDtypeStruct:
    """Type and shape to trace with, with what ``shard_map`` says of them."""
    more = {"weak_type": bool(getattr(aval, "weak_type", False))}
    varies = getattr(aval, "manual_axis_type", None)
    if varies is not None and getattr(varies, "varying", None):
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding, manual_axis_type=varies, **more)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **more)


_FACTS: dict[str, Facts] = {}


def facts_of(equation: Equation) -> Facts:
    """What is known of an equation, found out once for each kind of it."""
    eqn = equation.eqn
    types = ", ".join(f"{v.aval.str_short()}{'!' if isinstance(v, core.Literal) else ''}" for v in eqn.invars)
    key = f"{eqn.primitive} {eqn.params} {types} {[w < 0 for w in equation.writes]}"
    if key not in _FACTS:
        once = _once(eqn)
        flops = _flops(equation)
        _FACTS[key] = Facts(_kind(equation, flops) if once is None else Kind.OTHER, flops, once)
    return _FACTS[key]


# ---- may it run again? ----------------------------------------------------------------------------------------------


def _once(eqn: Any) -> Once | None:
    """Why an equation must not run again. What is inside of it counts, too."""
    if eqn.effects - _only_named_axes(eqn.effects):
        return Once.EFFECT
    if _communicates(eqn):
        return Once.COMMUNICATES
    if _has_callback(eqn):
        return Once.CALLBACK
    inner = (e for jaxpr in core.jaxprs_in_params(eqn.params) for e in jaxpr.eqns)
    return next((once for once in map(_once, inner) if once is not None), None)


def _only_named_axes(effects: Iterable[Any]) -> set[Any]:
    """The effects that say no more than that an equation speaks of a mesh's axis."""
    return {e for e in effects if type(e).__name__ == "NamedAxisEffect"}


def unplannable_effects(effects: Iterable[Any]) -> list[Any]:
    """The effects that a step cannot have to be planned."""
    return sorted(set(effects) - _only_named_axes(effects), key=str)


def _communicates(eqn: Any) -> bool:
    """Whether it speaks of a named axis of a mesh, and does more than to say that a value differs along it."""
    named = any("ax" in key and _names_an_axis(value) for key, value in eqn.params.items())
    return (named or bool(_only_named_axes(eqn.effects))) and not _only_says_it_varies(eqn)


def _names_an_axis(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list | set | frozenset) else (value,)
    return any(isinstance(part, str) for part in parts)


def _only_says_it_varies(eqn: Any) -> bool:
    """One operand, one result of its type, and nothing new but that it varies along more axes."""
    if eqn.effects or len(eqn.invars) != 1 or len(eqn.outvars) != 1:
        return False
    before, after = (
        getattr(getattr(v.aval, "manual_axis_type", None), "varying", frozenset()) for v in (*eqn.invars, *eqn.outvars)
    )
    return eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape and before < after


def _has_callback(eqn: Any) -> bool:
    """Whether it calls a function of Python's when it runs; rules for differentiation are called before."""
    return eqn.primitive not in CALLS and "callback" in eqn.params


# ---- what does it take? ---------------------------------------------------------------------------------------------


def _flops(equation: Equation) -> float:
    """Floating-point operations, inner loops included as often as they run where that is known."""
    eqn = equation.eqn
    inner = list(core.jaxprs_in_params(eqn.params))
    if inner:
        return _trips(eqn) * sum(inside_flops(jaxpr) for jaxpr in inner)
    out = sum(elements(v.aval) for v in eqn.outvars)
    if _is_applied_to_numbers(eqn):
        return float(out)
    try:
        specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.alone.invars]
        counted = jax.jit(lambda *xs: jax.core.eval_jaxpr(equation.alone, (), *xs)).lower(*specs).cost_analysis()
    except Exception:  # noqa: BLE001 - what cannot stand alone (in a mesh, say) is counted by what it makes
        return float(out)
    return float((counted or {}).get("flops") or 0.0)


def inside_flops(jaxpr: Any) -> float:
    """FLOPs of all equations of a jaxpr."""
    graph = graph_of(core.ClosedJaxpr(jaxpr, [None] * len(jaxpr.constvars)))
    return sum(facts_of(e).flops for e in graph.equations)


def _trips(eqn: Any) -> int:
    """How often a loop's body runs; once where that is not known."""
    length = eqn.params.get("length")
    return length if isinstance(length, int) else 1


# ---- how is it fused? -----------------------------------------------------------------------------------------------


def _kind(equation: Equation, flops: float) -> Kind:
    eqn = equation.eqn
    if is_pointwise(eqn):
        return Kind.POINTWISE
    if len(eqn.outvars) != 1 or len(eqn.invars) > 1 or any(True for _ in core.jaxprs_in_params(eqn.params)):
        return Kind.OTHER
    read, made = sum(elements(v.aval) for v in eqn.invars), elements(eqn.outvars[0].aval)
    if not flops and (made >= read or not eqn.invars):
        return Kind.LAYOUT
    return Kind.REDUCTION if made < read and flops <= _REDUCED_FLOPS * read else Kind.OTHER


def is_pointwise(eqn: Any) -> bool:
    """Whether every number of the results is made of the numbers at the same place."""
    inner = [graph_of(core.ClosedJaxpr(j, [None] * len(j.constvars))) for j in core.jaxprs_in_params(eqn.params)]
    if not inner:
        return _is_applied_to_numbers(eqn)
    return _trips(eqn) == 1 and "jvp" in "".join(eqn.params) and all(
        is_pointwise(e.eqn) or all(not v.aval.shape for v in e.eqn.invars) for graph in inner for e in graph.equations
    )  # fmt: skip


def _is_applied_to_numbers(eqn: Any) -> bool:
    """Whether it is applied to arrays of one shape, and can be applied to single numbers with the same parameters."""
    shapes = {v.aval.shape for v in eqn.outvars} | {v.aval.shape for v in eqn.invars if v.aval.shape}
    if len(shapes) != 1 or not eqn.invars or any(v.aval.shape for v in eqn.outvars if v.aval.shape not in shapes):
        return False
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in (*eqn.invars, *eqn.outvars)):
        return False
    try:
        alone = Equation(eqn, (), tuple(range(len(eqn.outvars)))).alone
        numbers = [jax.ShapeDtypeStruct((), v.aval.dtype) for v in alone.invars]
        made = jax.eval_shape(lambda *xs: jax.core.eval_jaxpr(alone, (), *xs), *numbers)
    except Exception:  # noqa: BLE001 - whatever says no
        return False
    return all(one.shape == () for one in made)
