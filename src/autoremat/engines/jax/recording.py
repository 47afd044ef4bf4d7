"""Records a function and its gradient as a program: one op for each group of equations that XLA runs as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import jax
import numpy as np
from jax import lax

from autoremat.engines.jax import core
from autoremat.engines.jax.facts import Kind, abstract, facts_of, is_inexact, machine, nbytes
from autoremat.engines.jax.fusion import Group, groups_of
from autoremat.engines.jax.graph import Atom, Equation, Graph, graph_of, source_of
from autoremat.program import END, Abilities, Once, Op, Program, Schedule, Value, simulate

Flat = Callable[..., Sequence[Any]]
"""A function of arrays that returns a list of arrays."""


@dataclass(frozen=True)
class Names:
    """What people call the arguments and the results of a step.

    Attributes:
        step: the function.
        arguments: one for each array that goes in.
        outputs: one for each array that comes out.
    """

    step: str = "step"
    arguments: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Recorded:
    """One step, forward and backward, as equations and as a program.

    Attributes:
        graph: inputs are the arguments, then the cotangents; outputs those of the function, then the gradients.
        groups: what runs as one; the program has one op for each, in the same order.
        program: what is planned.
        index: of every value that has one, its number in the program.
        n_arguments: how many inputs are arguments.
        n_outputs: how many outputs are those of the function.
        is_differentiated: for every argument whether a gradient is asked for.
        takes_cotangent: for every output of the function whether it has a cotangent.
    """

    graph: Graph
    groups: tuple[Group, ...]
    program: Program
    index: dict[int, int]
    n_arguments: int
    n_outputs: int
    is_differentiated: tuple[bool, ...]
    takes_cotangent: tuple[bool, ...]

    @property
    def arguments(self) -> tuple[int, ...]:
        """The values that are arguments."""
        return self.graph.inputs[: self.n_arguments]

    @property
    def cotangents(self) -> tuple[int, ...]:
        """The values that the backward starts from."""
        return self.graph.inputs[self.n_arguments :]

    @cached_property
    def first_late(self) -> int:
        """The first op of the backward."""
        return next((k for k, group in enumerate(self.groups) if group.is_late), len(self.groups))

    @cached_property
    def value_of(self) -> dict[int, int]:
        """The value of each number in the program."""
        return {number: value for value, number in self.index.items()}

    @cached_property
    def outputs(self) -> frozenset[int]:
        """The values that must be there at the end."""
        return frozenset(o for o in self.graph.outputs if isinstance(o, int))


def record(fn: Flat, avals: Sequence[Any], is_differentiated: Sequence[bool], names: Names | None = None) -> Recorded:
    """Trace a function and its gradient, on types and shapes alone.

    Args:
        fn: arrays to arrays.
        avals: of its arguments.
        is_differentiated: for every argument whether a gradient is asked for.
        names: of arguments and results, for those who read the plan.
    """
    given = [abstract(a) for a in avals]
    made = jax.make_jaxpr(fn)(*given).out_avals
    takes = tuple(is_inexact(a) for a in made)

    def joint(*flat: Any) -> list[Any]:
        arguments, cotangents = flat[: len(given)], iter(flat[len(given) :])
        outs, pull = jax.vjp(_of_some(fn, arguments, is_differentiated), *_some(arguments, is_differentiated))
        full = [
            next(cotangents) if t else np.zeros(o.shape, jax.dtypes.float0) for o, t in zip(outs, takes, strict=True)
        ]
        return [*outs, *pull(full)]

    closed = jax.make_jaxpr(joint)(*given, *[abstract(a) for a, t in zip(made, takes, strict=True) if t])
    return assembled(closed, len(given), len(made), tuple(is_differentiated), takes, names or Names())


def _some(values: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [v for v, c in zip(values, chosen, strict=True) if c]


def _of_some(fn: Flat, arguments: Sequence[Any], chosen: Sequence[bool]) -> Callable[..., list[Any]]:
    """The function of some of its arguments, the others as they are."""

    def partial(*some: Any) -> list[Any]:
        rest = iter(some)
        return list(fn(*[next(rest) if c else a for a, c in zip(arguments, chosen, strict=True)]))

    return partial


def assembled(
    closed: Any, n_arguments: int, n_outputs: int, is_differentiated: tuple[bool, ...], takes: tuple[bool, ...],
    names: Names,
) -> Recorded:  # fmt: skip
    """The program of a traced step."""
    graph = graph_of(closed)
    groups = groups_of(graph, graph.inputs[n_arguments:])
    build = _Assembly(graph, names, _dead_in_the_forward(groups, graph))
    build.add_inputs(n_arguments, is_differentiated)
    build.add_outputs(n_outputs, is_differentiated)
    build.add_ahead(groups)
    ops = tuple(build.op(group) for group in groups)
    program = Program(
        names.step, tuple(build.values), ops, recorded="fake", timing="estimated",
        abilities=Abilities("anywhere", ordered=False),
    )  # fmt: skip
    return Recorded(graph, groups, program, build.index, n_arguments, n_outputs, is_differentiated, takes)


class _Assembly:
    """Values and ops of a program, from groups in order."""

    def __init__(self, graph: Graph, names: Names, dead: frozenset[int]) -> None:
        self.values: list[Value] = []
        self.index: dict[int, int] = {}
        self._graph, self._names, self._machine, self._dead = graph, names, machine(), dead
        self._outputs = {o for o in graph.outputs if isinstance(o, int)}
        self._in_outputs = _reshaped_to_outputs(graph)

    def add_inputs(self, n_arguments: int, is_differentiated: Sequence[bool]) -> None:
        """Arguments and cotangents: they are there from beginning to end."""
        for k, v in enumerate(self._graph.inputs):
            is_argument = k < n_arguments
            kind = "parameter" if is_argument and is_differentiated[k] else "input"
            name = self._argument(k) if is_argument else "cotangent"
            self._add(v, name, fixed=True, kind=kind)

    def add_outputs(self, n_outputs: int, is_differentiated: Sequence[bool]) -> None:
        """What the caller gets has memory of its own during the whole step."""
        asked = [k for k, is_asked in enumerate(is_differentiated) if is_asked]
        for k, o in enumerate(self._graph.outputs):
            aval = jax.typeof(o.value) if not isinstance(o, int) else self._graph.avals[o]
            if k < n_outputs:
                known = self._names.outputs[k] if k < len(self._names.outputs) else f"output {k}"
            else:
                known = f"gradient of {self._argument(asked[k - n_outputs])}"
            kind = "gradient" if k >= n_outputs else ""
            label = f"{known} {_type_text(aval)}"
            self.values.append(
                Value(
                    f"out{k}", nbytes(aval), fixed=True, kind=kind, label=label, dtype=str(aval.dtype), shape=aval.shape
                )
            )

    def add_ahead(self, groups: Sequence[Group]) -> None:
        """XLA orders runs itself: at any moment it may hold one array more than it would in our order."""
        sizes = [
            nbytes(self._graph.avals[w])
            for group in groups
            if not any(_has_inner(self._graph.equations[m].eqn) for m in group.members)
            for w in group.writes
            if w not in self._outputs
        ]
        label = "one array that XLA may make ahead of time"
        self.values.append(Value("ahead", max(sizes, default=0), fixed=True, kind="temporary", label=label))

    def op(self, group: Group) -> Op:
        """The op of one group, and what it writes."""
        equations = [self._graph.equations[m] for m in group.members]
        facts = [facts_of(e) for e in equations]
        module, last = ".".join(equations[-1].path), equations[-1].eqn
        for w in group.writes:
            if w in self._outputs:  # its bytes are those of the output
                self._add(w, module or str(last.primitive), held=END, nbytes=0)
            elif w in self._in_outputs:
                self._add(w, module or str(last.primitive), nbytes=0)
            else:
                self._add(w, module or str(last.primitive))
        moved = sum(nbytes(self._graph.avals[v]) for v in (*group.reads, *group.writes))
        seconds = self._machine.seconds(sum(f.flops for f in facts), moved)
        once = Once.BACKWARD if group.is_late else next((f.once for f in facts if f.once), None)
        inner = (inner_peak_bytes(e) for e, f in zip(equations, facts, strict=True) if f.kind is Kind.OTHER)
        scratch = max(inner, default=0)
        return Op(
            _name(equations), tuple(self.index[r] for r in group.reads), tuple(self.index[w] for w in group.writes),
            seconds, scratch, "backward" if group.is_late else "forward", once, module=module,
            source=source_of(last), rerun_seconds=None if once is not None else self._again_seconds(group),
        )  # fmt: skip

    def _again_seconds(self, group: Group) -> float | None:
        """Seconds of a further run, where that takes less than the first."""
        if self._dead.issuperset(group.writes):
            return 0.0
        return self._machine.seconds(0, 0) if group.is_simple else None

    def _argument(self, k: int) -> str:
        return self._names.arguments[k] if k < len(self._names.arguments) else f"argument {k}"

    def _add(self, v: int, name: str, **given: Any) -> None:
        aval = self._graph.avals[v]
        size = given.pop("nbytes", nbytes(aval))
        shape = tuple(getattr(aval, "shape", ()))
        label = f"{name} {_type_text(aval)}"
        self.index[v] = len(self.values)
        self.values.append(Value(f"v{v}", size, label=label, dtype=str(aval.dtype), shape=shape, **given))


def _name(equations: Sequence[Any]) -> str:
    """What a group does last, and what goes into it."""
    names = list(dict.fromkeys(str(e.eqn.primitive) for e in equations[:-1]))
    last = str(equations[-1].eqn.primitive)
    return f"{last} of {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" if names else last


def _type_text(aval: Any) -> str:
    return f"{aval.dtype}{list(aval.shape)}"


def _dead_in_the_forward(groups: Sequence[Group], graph: Graph) -> frozenset[int]:
    """Values of the forward that only the backward needs, directly or by way of others like them.

    Where one is not kept, XLA leaves out the run that would have made it in the forward: the further run costs nothing.
    """
    needed = {o for o in graph.outputs if isinstance(o, int)}
    dead = set[int]()
    for group in reversed(groups):
        if group.is_late:
            continue
        if needed.isdisjoint(group.writes):
            dead.update(group.writes)
        else:
            needed.update(group.reads)
    return frozenset(dead)


def _is_reshape(equation: Equation) -> bool:
    """Whether the same numbers come out in the same order: for XLA the same memory."""
    is_one = equation.eqn.primitive is lax.reshape_p and equation.eqn.params.get("dimensions") is None
    return is_one and len(equation.operands) == 1


def _reshaped_to_outputs(graph: Graph) -> frozenset[int]:
    """Values that nobody reads but a reshape which makes an output of them: their bytes are those of the output."""
    readers = Counter(r for equation in graph.equations for r in equation.operands)
    outputs, found = {o for o in graph.outputs if isinstance(o, int)}, set[int]()
    for equation in reversed(graph.equations):
        if _is_reshape(equation) and (outputs | found).issuperset(equation.results):
            found.update(r for r in equation.operands if readers[r] == 1 and r not in outputs)
    return frozenset(found)


def _has_inner(eqn: Any) -> bool:
    return any(True for _ in core.jaxprs_in_params(eqn.params))


_INNER_PEAKS: dict[str, int] = {}
_REMEMBERED: Final = 4096


def inner_peak_bytes(equation: Equation) -> int:
    """Bytes that an equation with equations inside takes beside what it reads and writes, by the same account."""
    if not _has_inner(equation.eqn):
        return 0
    if equation.kind not in _INNER_PEAKS:
        while len(_INNER_PEAKS) >= _REMEMBERED:
            _INNER_PEAKS.pop(next(iter(_INNER_PEAKS)))
        _INNER_PEAKS[equation.kind] = max(
            _peak_beside(j, equation.eqn.params.get("num_carry")) for j in core.jaxprs_in_params(equation.eqn.params)
        )
    return _INNER_PEAKS[equation.kind]


def _peak_beside(jaxpr: Any, n_carry: int | None) -> int:
    """Bytes beside what goes in and out; ``n_carry`` of the body of a scan, whose further results are stacked."""
    closed = core.ClosedJaxpr(jaxpr, [np.zeros(v.aval.shape, v.aval.dtype) for v in jaxpr.constvars])
    n = len(jaxpr.invars)
    inside = assembled(closed, n, len(jaxpr.outvars), (False,) * n, (), Names())
    copied = 0 if n_carry is None else _copied_bytes(inside.graph, inside.graph.outputs[n_carry:])
    return simulate(inside.program, Schedule.plain(inside.program)).peak_bytes - inside.program.fixed_bytes + copied


def _copied_bytes(graph: Graph, results: Iterable[Atom]) -> int:
    """Bytes of those that a loop has made in memory of its own, from where they are copied to a stack."""
    maker = {w: equation for equation in graph.equations for w in equation.results}
    size = 0
    for value in (r for r in results if isinstance(r, int)):
        made_by = maker.get(value)
        while made_by is not None and _is_reshape(made_by):
            made_by = maker.get(made_by.operands[0])
        size += nbytes(graph.avals[value]) if made_by is not None and _has_inner(made_by.eqn) else 0
    return size
