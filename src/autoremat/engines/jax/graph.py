"""A jaxpr as a flat list of equations: calls looked into, values numbered, what nobody needs left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import jax
from jax.extend import source_info_util
from jax.extend.core import primitives

from autoremat.engines.jax import core

source_info_util.register_exclusion(str(Path(__file__).parent))  # lines of code are the user's

CALLS: Final = {
    primitives.jit_p: "jaxpr",
    primitives.closed_call_p: "call_jaxpr",
    primitives.call_p: "call_jaxpr",
    primitives.remat_p: "jaxpr",
}
"""Calls that mean nothing but what is inside, and the parameter that has it. Custom rules are no such calls: whoever
differentiates once more must find them."""


def jaxpr_of(inputs: Sequence[Any], outputs: Sequence[Any], eqns: Sequence[Any], effects: Any) -> Any:
    """A jaxpr of these equations, without constants."""
    names = tuple(f"a{k}" for k in range(len(inputs))), tuple(f"r{k}" for k in range(len(outputs)))
    return core.Jaxpr((), inputs, outputs, eqns, effects, core.DebugInfo("jit", "autoremat", *names))


@dataclass(frozen=True, eq=False)
class Constant:
    """A number or an array that stands in a jaxpr, in the place of a value."""

    value: Any


Atom = int | Constant
"""What an equation reads: a value by its number, or a constant."""


@dataclass(frozen=True, eq=False)
class Equation:
    """One equation of a jaxpr on numbered values.

    Attributes:
        eqn: as JAX has it.
        reads: one for each of its operands.
        writes: numbers of its results; -1 for one that is dropped.
        path: of the named scopes of the calls around it.
    """

    eqn: Any
    reads: tuple[Atom, ...]
    writes: tuple[int, ...]
    path: tuple[str, ...] = ()

    @property
    def operands(self) -> tuple[int, ...]:
        """The values that it reads, each once."""
        return tuple(dict.fromkeys(r for r in self.reads if isinstance(r, int)))

    @property
    def results(self) -> tuple[int, ...]:
        """The values that it writes."""
        return tuple(w for w in self.writes if w >= 0)

    @cached_property
    def kind(self) -> str:
        """Everything that tells it from others but the values that it reads and writes."""
        types = ", ".join(f"{v.aval.str_short()}{'!' if isinstance(v, core.Literal) else ''}" for v in self.eqn.invars)
        return f"{self.eqn.primitive} {self.eqn.params} {types} {[w < 0 for w in self.writes]}"

    @cached_property
    def alone(self) -> Any:
        """A jaxpr of this equation and no other."""
        eqn = self.eqn
        operands = tuple(dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal)))
        results = [v for v, w in zip(eqn.outvars, self.writes, strict=True) if w >= 0]
        return jaxpr_of(operands, results, [eqn], eqn.effects)

    def run(self, known: Sequence[Any]) -> list[Any]:
        """Its results, given what it reads; from it alone, so that rules, scopes and contexts are JAX's own."""
        values: dict[Any, Any] = {}
        for var, value in zip(self.eqn.invars, known, strict=True):
            if not isinstance(var, core.Literal):
                values[var] = value
        return list(jax.core.eval_jaxpr(self.alone, (), *values.values()))


@dataclass(frozen=True, eq=False)
class Graph:
    """Equations in order.

    Attributes:
        avals: type and shape of each value.
        equations: in order.
        inputs: values that are given.
        outputs: values and constants that are asked for.
    """

    avals: tuple[Any, ...]
    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Atom, ...]


def graph_of(closed: Any) -> Graph:
    """The graph of a closed jaxpr."""
    walk = _Walk()
    inputs = tuple(walk.new(v.aval) for v in closed.jaxpr.invars)
    known = dict(zip(closed.jaxpr.invars, inputs, strict=True))
    known |= dict(zip(closed.jaxpr.constvars, map(Constant, closed.consts), strict=True))
    outputs = walk.through(closed.jaxpr, known, ())
    return Graph(tuple(walk.avals), _needed(walk.equations, outputs), inputs, outputs)


class _Walk:
    """Numbers values on the way through a jaxpr."""

    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.equations: list[Equation] = []

    def new(self, aval: Any) -> int:
        """A further value."""
        self.avals.append(aval)
        return len(self.avals) - 1

    def through(self, jaxpr: Any, known: dict[Any, Atom], path: tuple[str, ...]) -> tuple[Atom, ...]:
        """Add the equations of a jaxpr; returns its outputs."""
        for eqn in jaxpr.eqns:
            reads = tuple(_read(known, v) for v in eqn.invars)
            inside = _inside(eqn)
            if inside is not None:
                results: Sequence[Atom] = self._through_call(inside, reads, (*path, *scopes_of(eqn)))
                known.update(zip(eqn.outvars, results, strict=True))
                continue
            writes = tuple(-1 if isinstance(v, core.DropVar) else self.new(v.aval) for v in eqn.outvars)
            known.update((v, w) for v, w in zip(eqn.outvars, writes, strict=True) if w >= 0)
            self.equations.append(Equation(eqn, reads, writes, (*path, *scopes_of(eqn))))
        return tuple(_read(known, v) for v in jaxpr.outvars)

    def _through_call(self, inside: Any, reads: Sequence[Atom], path: tuple[str, ...]) -> Sequence[Atom]:
        jaxpr, consts = (inside.jaxpr, inside.consts) if isinstance(inside, core.ClosedJaxpr) else (inside, ())
        known: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        return self.through(jaxpr, known | dict(zip(jaxpr.invars, reads, strict=True)), path)


def _read(known: dict[Any, Atom], var: Any) -> Atom:
    return Constant(var.val) if isinstance(var, core.Literal) else known[var]


def _inside(eqn: Any) -> Any:
    """The jaxpr of a call that is looked into; None for any other equation."""
    return eqn.params.get(CALLS[eqn.primitive]) if eqn.primitive in CALLS else None


def _needed(equations: Iterable[Equation], outputs: Iterable[Atom]) -> tuple[Equation, ...]:
    """The equations that outputs depend on, or that have an effect."""
    needed, kept = {o for o in outputs if isinstance(o, int)}, list[Equation]()
    for equation in reversed(list(equations)):
        if equation.eqn.effects or not needed.isdisjoint(equation.results):
            kept.append(equation)
            needed.update(equation.operands)
    return tuple(reversed(kept))


def scopes_of(eqn: Any) -> tuple[str, ...]:
    """The named scopes that an equation was made in, without what JAX's transformations add."""
    text = str(eqn.source_info.name_stack)
    while text.endswith(")") and text.partition("(")[0].isidentifier():
        text = text.partition("(")[2][:-1]
    parts = (part.rpartition("(")[2].rstrip(")") for part in text.split("/"))
    return tuple(part for part in parts if part)


def source_of(eqn: Any) -> str:
    """``file:line`` of the user's code that an equation comes from; "" where that is not known."""
    text = source_info_util.summarize(eqn.source_info).partition(" (")[0]
    file, _, rest = text.rpartition("/")
    name, *numbers = rest.split(":")
    return f"{file}/{name}:{numbers[0]}" if file and numbers else ""
