"""Which equations run as one: a model of XLA's fusion, so that planned values are those that get memory.

An equation joins the equations that read it where XLA would compute it inside of them. What is laid out anew or made
larger joins any single reader; numbers made place by place join a reader that works place by place or reduces. What is
made large from little, such as a broadcast bias, is made again in every reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from autoremat.engines.jax.facts import Kind, facts_of, nbytes
from autoremat.engines.jax.graph import Graph

_GROWTH: Final = 4
"""How many times larger than what it reads a value is that every reader makes for itself."""
_SAME: Final = 1.25
"""The same where it takes simple arithmetic: then what is read could be kept as well as what is made of it."""


@dataclass(frozen=True)
class Group:
    """Equations that run as one.

    Attributes:
        members: indices of equations, ascending; the last one that is not repeated elsewhere gives the place.
        reads: values from outside.
        writes: values that something outside reads, or that are outputs.
        is_late: whether one of them depends on a cotangent.
        is_simple: whether XLA would rather do it again inside of those that read it than keep what it makes.
    """

    members: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    is_late: bool
    is_simple: bool = False


def groups_of(graph: Graph, late_inputs: Sequence[int]) -> tuple[Group, ...]:
    """The groups in the order they run: first what does not depend on the late inputs, then what does."""
    late = _late(graph, late_inputs)
    members = _shared_out(graph, _joined(graph))
    order = sorted(members, key=lambda head: (any(late[m] for m in members[head]), head))
    outputs = {o for o in graph.outputs if isinstance(o, int)}
    read_by = _readers_of_values(graph, members)
    homes = Counter(m for group in members.values() for m in group)
    groups = []
    for head in order:
        equations = [graph.equations[m] for m in members[head]]
        made = {w for e in equations for w in e.results}
        reads = tuple(dict.fromkeys(r for e in equations for r in e.operands if r not in made))
        own = {w for m in members[head] if homes[m] == 1 for w in graph.equations[m].results}
        writes = tuple(sorted(w for w in own if w in outputs or read_by.get(w, set()) - {head}))
        heads = {h for w in writes for h in read_by.get(w, set()) - {head}}
        is_simple = outputs.isdisjoint(writes) and _is_simple(graph, members[head], reads, writes, heads)
        groups.append(Group(members[head], reads, writes, any(late[m] for m in members[head]), is_simple))
    return tuple(groups)


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
    """The members of each group; what every reader makes for itself is in all groups that read it."""
    outputs = {o for o in graph.outputs if isinstance(o, int)}
    readers = _readers(graph)
    members: dict[int, set[int]] = {}
    for k, h in enumerate(head):
        members.setdefault(h, set()).add(k)
    belongs = {k: {h} for h, group in members.items() for k in group}
    for h in sorted(members, reverse=True):
        results = graph.equations[h].results
        into = {g for w in results for r in readers.get(w, ()) for g in belongs[r]}
        if not into or not outputs.isdisjoint(results) or not _is_made_anew(graph, members[h], h):
            continue
        for g in into:
            members[g] |= members[h]
        for m in members.pop(h):
            belongs[m] = belongs[m] - {h} | into
    return {h: tuple(sorted(group)) for h, group in members.items()}


def _is_made_anew(graph: Graph, group: set[int], head: int) -> bool:
    """Whether every reader makes for itself what a group makes, because it is much of little, by laying out alone."""
    equation = graph.equations[head]
    read = sum(nbytes(graph.avals[r]) for r in equation.operands)
    written = sum(nbytes(graph.avals[w]) for w in equation.results)
    return len(group) == 1 and facts_of(equation).kind is Kind.LAYOUT and _GROWTH * read <= written


def _is_simple(
    graph: Graph, group: Sequence[int], reads: Sequence[int], writes: Sequence[int], heads: set[int]
) -> bool:
    """Whether readers could as well do for themselves what a group does: little work, no more to read than to write."""
    facts = [facts_of(graph.equations[m]) for m in group]
    read, written = (sum(nbytes(graph.avals[v]) for v in values) for values in (reads, writes))
    return (
        all(f.is_cheap or f.kind is Kind.LAYOUT for f in facts)
        and read <= _SAME * written
        and all(facts_of(graph.equations[h]).kind is not Kind.OTHER for h in heads)
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
