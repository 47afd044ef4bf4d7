"""What is known of an equation: its bytes, FLOPs and seconds, how XLA fuses it, and whether it may run again.

Nothing here goes by the name of a primitive. What an equation does is found out by asking for its properties: whether
it can be applied to single numbers, what XLA counts for it, what its types and parameters are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import jax
import numpy as np

from autoremat.engines.jax import core
from autoremat.engines.jax.graph import CALLS, Equation, Graph, graph_of
from autoremat.program import Once

_LAUNCH_SECONDS: Final = 2e-6
_REDUCED_FLOPS: Final = 1.5
"""FLOPs for each number read, up to which what makes one number out of many is a plain reduction."""

_TRANSCENDENTAL_FLOPS: Final = 10


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
        is_cheap: whether it is simple arithmetic, place by place, that readers may as well do for themselves.
        once: why it must not run again; None when it may.
    """

    kind: Kind
    flops: float
    is_cheap: bool = False
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
    """Type and shape to trace with, with what ``shard_map`` and explicit sharding say of them."""
    more: dict[str, Any] = {"weak_type": bool(getattr(aval, "weak_type", False))}
    if core.varying(aval):
        more |= {"sharding": aval.sharding} | core.axis_type(aval)
    elif _is_sharded_by_type(aval):
        more["sharding"] = aval.sharding
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, **more)


def _is_sharded_by_type(aval: Any) -> bool:
    """Whether its type says which devices have which part of it."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types


_FACTS: dict[str, Facts] = {}
_REMEMBERED: Final = 4096


def facts_of(equation: Equation) -> Facts:
    """What is known of an equation, found out once for each kind of it."""
    key = equation.kind
    if key not in _FACTS:
        while len(_FACTS) >= _REMEMBERED:
            _FACTS.pop(next(iter(_FACTS)))
        _FACTS[key] = _found(equation)
    return _FACTS[key]


def _found(equation: Equation) -> Facts:
    eqn = equation.eqn
    once = _once(eqn)
    if once is not None:
        return Facts(Kind.OTHER, float(sum(elements(v.aval) for v in eqn.outvars)), once=once)
    if any(True for _ in core.jaxprs_in_params(eqn.params)):
        return Facts(Kind.POINTWISE if _is_pointwise_inside(eqn) else Kind.OTHER, _inner_flops(eqn))
    counts = _counts_of_numbers(eqn)
    if counts is not None:
        work = counts.flops + _TRANSCENDENTAL_FLOPS * counts.transcendentals
        return Facts(Kind.POINTWISE, work * elements(eqn.outvars[0].aval), is_cheap=not counts.transcendentals)
    flops = _flops(equation)
    return Facts(_kind_of_one(eqn, flops), flops)


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
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    return before.shape == after.shape and core.varying(before) < core.varying(after)


def _has_callback(eqn: Any) -> bool:
    """Whether it calls a function of Python's when it runs; rules for differentiation are called before."""
    return eqn.primitive not in CALLS and "callback" in eqn.params


# ---- what does it take? ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What XLA counts for code that has not been compiled."""

    flops: float
    transcendentals: float


def _counted(jaxpr: Any, types: Sequence[jax.ShapeDtypeStruct]) -> tuple[Counts, Sequence[Any]]:
    """XLA's counts for a jaxpr applied to arrays of these types, and the types of its results."""
    lowered = jax.jit(lambda *xs: jax.core.eval_jaxpr(jaxpr, (), *xs)).lower(*types)
    found = lowered.cost_analysis() or {}
    return Counts(found.get("flops") or 0.0, found.get("transcendentals") or 0.0), jax.tree.leaves(lowered.out_info)


def _flops(equation: Equation) -> float:
    """Floating-point operations of an equation without any inside."""
    try:
        types = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.alone.invars]
        return _counted(equation.alone, types)[0].flops
    except Exception:  # noqa: BLE001 - what cannot stand alone (in a mesh, say) is counted by what it makes
        return float(sum(elements(v.aval) for v in equation.eqn.outvars))


def _inner_flops(eqn: Any) -> float:
    """The same of one with equations inside: a loop's body as often as it runs, where that is known."""
    length = eqn.params.get("length")
    trips = length if isinstance(length, int) else 1
    return trips * sum(inside_flops(jaxpr) for jaxpr in core.jaxprs_in_params(eqn.params))


def inside_flops(jaxpr: Any) -> float:
    """FLOPs of all equations of a jaxpr."""
    return sum(facts_of(e).flops for e in _graph_of(jaxpr).equations)


def _graph_of(jaxpr: Any) -> Graph:
    return graph_of(core.ClosedJaxpr(jaxpr, [None] * len(jaxpr.constvars)))


# ---- how is it fused? -----------------------------------------------------------------------------------------------


def _kind_of_one(eqn: Any, flops: float) -> Kind:
    """The kind of an equation that does not work place by place."""
    if len(eqn.outvars) != 1 or len(eqn.invars) > 1:
        return Kind.OTHER
    read, made = sum(elements(v.aval) for v in eqn.invars), elements(eqn.outvars[0].aval)
    if not flops and (made >= read or not eqn.invars):
        return Kind.LAYOUT
    return Kind.REDUCTION if made < read and flops <= _REDUCED_FLOPS * read else Kind.OTHER


def _is_pointwise_inside(eqn: Any) -> bool:
    """Whether a custom rule or a call, no loop and no choice, has nothing inside but what works place by place."""
    shapes = {v.aval.shape for v in (*eqn.invars, *eqn.outvars) if v.aval.shape}
    inner = list(core.jaxprs_in_params(eqn.params))
    if len(shapes) > 1 or len(inner) != 1 or len(inner[0].invars) != len(eqn.invars) or "length" in eqn.params:
        return False
    return all(
        facts_of(e).kind is Kind.POINTWISE or all(not v.aval.shape for v in e.eqn.invars)
        for e in _graph_of(inner[0]).equations
    )


def _counts_of_numbers(eqn: Any) -> Counts | None:
    """What it takes for one number, if it is applied to arrays of one shape and can be applied to single numbers.

    None where it cannot, with the same parameters: then it does not work place by place.
    """
    shapes = {v.aval.shape for v in eqn.outvars} | {v.aval.shape for v in eqn.invars if v.aval.shape}
    if len(shapes) != 1 or not eqn.invars:
        return None
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.extended) for v in (*eqn.invars, *eqn.outvars)):
        return None
    alone = Equation(eqn, (), tuple(range(len(eqn.outvars)))).alone
    try:
        counts, made = _counted(alone, [jax.ShapeDtypeStruct((), v.aval.dtype) for v in alone.invars])
    except Exception:  # noqa: BLE001 - whatever says no
        return None
    return counts if all(one.shape == () for one in made) else None
