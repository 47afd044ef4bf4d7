"""Which equations run as one: a model of XLA's fusion, so that planned values are those that get memory.

An equation joins the equations that read it where XLA would compute it inside of them. What is laid out anew or made
larger joins any single reader; numbers made place by place join a reader that works place by place or reduces. What is
made large from little, such as a broadcast bias, is made again in every reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autoremat.engines.jax.facts import Kind, facts_of, nbytes
from autoremat.engines.jax.graph import Equation, Graph

_GROWTH: Final = 4
"""How many times larger than what it reads a value is that every reader makes for itself."""


@dataclass(frozen=True)
class Group:
    """Equations that run as one.

    Attributes:
        members: indices of equations, ascending; the last one that is not repeated elsewhere gives the place.
        reads: values from outside.
        writes: values that something outside reads, or that are outputs.
        is_late: whether one of them depends on a cotangent.
    """

    members: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    is_late: bool


def groups_of(graph: Graph, late_inputs: Sequence[int]) -> tuple[Group, ...]:
    """The groups in the order they run: first what does not depend on the late inputs, then what does."""
    late = _late(graph, late_inputs)
    members = _shared_out(graph, _joined(graph))
    order = sorted(members, key=lambda head: (any(late[m] for m in members[head]), head))
    outputs = {o for o in graph.outputs if isinstance(o, int)}
    read_by = _readers_of_values(graph, members)
    groups = []
    for head in order:
        equations = [graph.equations[m] for m in members[head]]
        made = {w for e in equations for w in e.results}
        reads = tuple(dict.fromkeys(r for e in equations for r in e.operands if r not in made))
        own = {w for m in members[head] if m == head or _is_only_in(m, head, members) for w in graph.equations[m].results}
        writes = tuple(sorted(w for w in own if w in outputs or read_by.get(w, set()) - {head}))
        groups.append(Group(members[head], reads, writes, any(late[m] for m in members[head])))
    return tuple(groups)


def _is_only_in(member: int, head: int, members: Mapping[int, Sequence[int]]) -> bool:
    return all(member not in others for other, others in members.items() if other != head)


def _late(graph: Graph, late_inputs: Sequence[int]) -> list[bool]:
    """For every equation whether it depends on a late input."""
    late_values, late = set(late_inputs), list[bool]()
    for equation in graph.equations:
        late.append(not late_values.isdisjoint(equation.operands))
        if late[-1]:
            late_values.update(equation.results)
    return late


def _joined(graph: Graph) -> list[int]:
    """For every equation the head of its group: the equation that it joins, or itself."""
    outputs = {o for o in graph.outputs if isinstance(o, int)}
    readers = _readers(graph)
    head = list(range(len(graph.equations)))
    for k in range(len(head) - 1, -1, -1):
        equation = graph.equations[k]
        kind = facts_of(equation).kind
        heads = {head[r] for w in equation.results for r in readers.get(w, ())}
        if kind not in (Kind.LAYOUT, Kind.POINTWISE) or len(heads) != 1 or not outputs.isdisjoint(equation.results):
            continue
        (reader,) = heads
        if kind is Kind.LAYOUT or facts_of(graph.equations[reader]).kind is not Kind.OTHER:
            head[k] = reader
    return head


def _shared_out(graph: Graph, head: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The members of each group; what is made large from little is in every group that reads it."""
    outputs = {o for o in graph.outputs if isinstance(o, int)}
    readers = _readers(graph)
    members: dict[int, set[int]] = {}
    for k, h in enumerate(head):
        members.setdefault(h, set()).add(k)
    belongs = {k: {h} for h, group in members.items() for k in group}
    for k in sorted(members, reverse=True):
        equation = graph.equations[k]
        if members[k] != {k} or not outputs.isdisjoint(equation.results) or not _grows(graph, equation):
            continue
        into = {h for w in equation.results for r in readers.get(w, ()) for h in belongs[r]}
        if not into:
            continue
        for h in into:
            members[h].add(k)
        belongs[k] = into
        del members[k]
    return {h: tuple(sorted(group)) for h, group in members.items()}


def _grows(graph: Graph, equation: Equation) -> bool:
    """Whether an equation makes much of little, by laying out alone."""
    read = sum(nbytes(graph.avals[r]) for r in equation.operands)
    return facts_of(equation).kind is Kind.LAYOUT and _GROWTH * read <= sum(
        nbytes(graph.avals[w]) for w in equation.results
    )


def _readers(graph: Graph) -> dict[int, list[int]]:
    """For every value the equations that read it."""
    table: dict[int, list[int]] = {}
    for k, equation in enumerate(graph.equations):
        for r in equation.operands:
            table.setdefault(r, []).append(k)
    return table


def _readers_of_values(graph: Graph, members: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """For every value the groups that read it."""
    table: dict[int, set[int]] = {}
    for head, group in members.items():
        for m in group:
            for r in graph.equations[m].operands:
                table.setdefault(r, set()).add(head)
    return table
