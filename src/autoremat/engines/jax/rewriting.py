"""A jaxpr run equation by equation, its scans by a rule of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import primitives

from autoremat.engines.jax import core
from autoremat.engines.jax.graph import Atom, Constant, Equation, graph_of
from autoremat.engines.jax.recording import Flat
from autoremat.engines.jax.scans import Shape

ScanRule = Callable[[Any, Sequence[Any]], Sequence[Any]]
"""A scan's equation and its inputs to its outputs."""


def shape_of(eqn: Any) -> Shape:
    """The form of a scan's equation."""
    p = eqn.params
    return Shape(p["length"], p["num_consts"], p["num_carry"], p["reverse"], p["unroll"])


def is_planned_scan(eqn: Any) -> bool:
    """Whether an equation is a scan that is worth a plan: one that goes on."""
    return eqn.primitive is primitives.scan_p and eqn.params["length"] > 1


def has_scans(closed: Any) -> bool:
    """Whether a jaxpr has scans, in calls that are looked into."""
    return any(is_planned_scan(e.eqn) for e in graph_of(closed).equations)


def with_scans(closed: Any, rule: ScanRule) -> Flat:
    """The function of a closed jaxpr, with scans by a rule."""
    graph = graph_of(closed)

    def flat(*arrays: Any) -> list[Any]:
        values: dict[int, Any] = dict(zip(graph.inputs, arrays, strict=True))
        for equation in graph.equations:
            reads = [_value(r, values) for r in equation.reads]
            values.update(zip(equation.results, _results(equation, reads, rule), strict=True))
        return [_value(o, values) for o in graph.outputs]

    return flat


def _results(equation: Equation, reads: Sequence[Any], rule: ScanRule) -> Sequence[Any]:
    if not is_planned_scan(equation.eqn):
        return equation.run(reads)
    made = rule(equation.eqn, reads)
    return [m for m, w in zip(made, equation.writes, strict=True) if w >= 0]


def _value(atom: Atom, values: dict[int, Any]) -> Any:
    return atom.value if isinstance(atom, Constant) else values[atom]


def as_it_is(eqn: Any) -> Flat:
    """The function of one equation."""
    alone = Equation(eqn, (), tuple(range(len(eqn.outvars)))).alone

    def flat(*inputs: Any) -> list[Any]:
        known: dict[Any, Any] = {
            v: x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, core.Literal)
        }
        return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*known.values()))

    return flat
