"""Which values to keep at a given price of memory: a minimum cut.

For a price of ``price`` seconds per byte, every demanded value is either kept, for ``price * bytes``, or its op runs
again, for its seconds, and then all inputs of the op must be available in the same sense. That is a closure problem,
solved exactly by one minimum cut (Picard 1976; for checkpointing: the partitioner of AOTAutograd). With segments, what
a rerun reads from an earlier segment must be kept, which bounds what has to be in memory when a segment runs
again; segments are then solved on their own, last one first, and equal segments only once.

The graph: source -> op (price * bytes) for an op whose result is demanded; for a result that is not, a node of its
own between the ops that read it and its op; op -> sink (seconds); op -> input that can only be kept -> sink
(price * bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from autoremat.planner import clock
from autoremat.planner.search.tables import Tables
from autoremat.planner.solvers.segments import segment_of

Floats = npt.NDArray[np.float64]
_CUT_SECONDS, _EDGE_SECONDS = 5e-4, 3e-6
"""What a cut counts as work: in any case, and for each edge."""
_LARGEST: Final = 1 << 30
_SCALE: Final = 5e8
_SOURCE, _SINK = 0, 1


@dataclass(frozen=True)
class Cut:
    """The cheapest choice at one price.

    Attributes:
        kept: values to keep, ``reruns``: ops to run again.
        cost: seconds of the reruns plus price times kept bytes; never above the true minimum.
    """

    kept: tuple[int, ...]
    reruns: tuple[int, ...]
    cost: float


@dataclass(frozen=True, eq=False)
class Network:
    """One closure problem, ready to be solved at any price.

    Attributes:
        ops: that may run again, in program order.
        wanted: demanded values made by ``ops``.
        inner: values made by ``ops`` that are not demanded themselves.
        outer: values that reruns read and that can only be kept.
        edges: ``(tail, head, kind, index)``; kind 0: price * bytes of value ``index``, 1: seconds of op ``index``,
            2: infinite; nodes are numbered source, sink, ops, inner, outer.
    """

    ops: tuple[int, ...]
    wanted: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    edges: tuple[tuple[int, int, int, int], ...]

    @cached_property
    def shape(self) -> tuple[Any, ...]:
        """What two networks must have in common to have the same cuts, apart from seconds and bytes."""
        position = {v: k for k, v in enumerate((*self.wanted, *self.inner, *self.outer))}
        op = {i: k for k, i in enumerate(self.ops)}
        return tuple((a, b, kind, (position, op, {})[kind].get(index, 0)) for a, b, kind, index in self.edges)

    @cached_property
    def _kinds_and_indices(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        table = np.array(self.edges, dtype=np.int64).reshape(-1, 4)
        return table[:, 2], table[:, 3]

    def solve(self, price: float, nbytes: Floats, seconds: Floats, paid: frozenset[int] = frozenset()) -> Cut:
        """The cheapest choice; values in ``paid`` are kept already. One maximum flow."""
        capacity = self._capacities(price, nbytes, seconds, paid)
        size = 2 + len(self.ops) + len(self.inner) + len(self.outer)
        clock.spend(_CUT_SECONDS + _EDGE_SECONDS * len(self.edges))
        flow, reached, scale = _max_flow(size, self.edges, capacity)
        again = tuple(i for k, i in enumerate(self.ops) if reached[2 + k])
        return Cut(self._kept(reached, paid), again, flow / scale)

    def _capacities(self, price: float, nbytes: Floats, seconds: Floats, paid: frozenset[int]) -> Floats:
        kinds, index = self._kinds_and_indices
        capacity = np.full(len(self.edges), np.inf)
        for kind, weight in ((0, price * nbytes), (1, seconds)):
            chosen = kinds == kind
            capacity[chosen] = weight[index[chosen]]
        for k, (_, _, kind, v) in enumerate(self.edges if paid else ()):
            if kind == 0 and v in paid:
                capacity[k] = 0.0
        return capacity

    def _kept(self, reached: npt.NDArray[np.bool_], paid: frozenset[int]) -> tuple[int, ...]:
        kept = set(paid.intersection((*self.wanted, *self.inner, *self.outer)))
        for tail, head, kind, v in self.edges:
            if kind == 0 and reached[tail] and not reached[head]:
                kept.add(v)
        return tuple(sorted(kept))


def _max_flow(
    size: int, edges: Sequence[tuple[int, int, int, int]], capacity: Floats
) -> tuple[int, npt.NDArray[np.bool_], float]:
    """Value of the maximum flow in scaled integers (rounded down), the source side of the cut, and the scale."""
    from scipy.sparse import csr_matrix  # here: a first plan needs no cut, and scipy takes longer than it does
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    tail = np.array([e[0] for e in edges], dtype=np.int64)
    head = np.array([e[1] for e in edges], dtype=np.int64)
    finite = np.isfinite(capacity)
    limit = min(capacity[tail == _SOURCE].sum(), capacity[head == _SINK].sum())
    if not 0 < limit < np.inf:
        limit = capacity[finite].max(initial=0.0)
    scale = _SCALE / limit if limit else 1.0
    scaled = np.full(len(edges), _LARGEST, dtype=np.int32)
    scaled[finite] = np.minimum(np.floor(capacity[finite] * scale), _LARGEST).astype(np.int32)
    # Two edges between the same nodes (an op with two demanded results) add up in the matrix.
    graph = csr_matrix((scaled.astype(np.int64), (tail, head)), shape=(size, size))
    graph.data = np.minimum(graph.data, _LARGEST)
    graph = graph.astype(np.int32)
    graph.eliminate_zeros()
    reached = np.zeros(size, dtype=bool)
    reached[_SOURCE] = True
    if not graph.nnz:
        return 0, reached, scale
    result = maximum_flow(graph, _SOURCE, _SINK)
    residual = graph - result.flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reached[breadth_first_order(residual, _SOURCE, return_predecessors=False)] = True
    return int(result.flow_value), reached, scale


def build(
    ops: Iterable[int],
    demanded: Callable[[int], bool],
    free: Callable[[int], bool],
    keepable: Callable[[int], bool],
    writes: Callable[[int], Sequence[int]],
    reads: Callable[[int], Sequence[int]],
    before: Mapping[int, int] = MappingProxyType({}),
) -> Network:
    """The network of a set of ops that may run again; only those that a demand can reach get into it.

    Args:
        ops: in program order.
        demanded: whether a value made by ``ops`` must be available.
        free: whether a value is available in any case, at no cost.
        keepable: whether a value can be kept at all.
        writes: values that an op writes.
        reads: values that an op reads.
        before: for an op that runs again only together with another one that other one.
    """
    chosen, needed = _reachable(ops, demanded, free, writes, reads, before)
    made = {v for i in chosen for v in writes(i) if not free(v)}
    wanted = tuple(sorted(v for v in made if demanded(v)))
    # A demanded value that cannot be kept makes its op run again, and that needs a node to say so.
    inner = tuple(sorted(v for v in made if v in needed and not demanded(v)))
    outer = tuple(sorted(v for v in needed if v not in made))
    op_node = {i: 2 + k for k, i in enumerate(chosen)}
    node = {v: 2 + len(chosen) + k for k, v in enumerate((*inner, *outer))}
    edges: list[tuple[int, int, int, int]] = []
    for i in chosen:
        edges.append((op_node[i], _SINK, 1, i))
        for v in writes(i):
            if not free(v) and (demanded(v) or v in node):
                tail = node.get(v, _SOURCE)
                edges.append((tail, op_node[i], 0 if keepable(v) else 2, v))
        edges += [(op_node[i], node[v], 2, v) for v in dict.fromkeys(reads(i)) if v in node]
        if before.get(i) in op_node:
            edges.append((op_node[i], op_node[before[i]], 2, i))
    edges += [(node[v], _SINK, 0, v) for v in outer]
    return Network(tuple(chosen), wanted, inner, outer, tuple(edges))


def _reachable(
    ops: Iterable[int],
    demanded: Callable[[int], bool],
    free: Callable[[int], bool],
    writes: Callable[[int], Sequence[int]],
    reads: Callable[[int], Sequence[int]],
    before: Mapping[int, int],
) -> tuple[list[int], set[int]]:
    """The ops that some demand can make run again, in program order, and the values those read."""
    needed: set[int] = set()
    chosen: list[int] = []
    for i in sorted(ops, reverse=True):
        with_another = bool(before) and bool(chosen) and before.get(chosen[-1]) == i
        if with_another or any((demanded(v) or v in needed) and not free(v) for v in writes(i)):
            chosen.append(i)
            needed.update(v for v in reads(i) if not free(v))
    return chosen[::-1], needed


class Pricer:
    """Keep sets of one program at any price, for any segmentation; equal segments are solved once."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._nbytes = np.array([v.nbytes for v in tables.values], dtype=np.float64)
        self._seconds = np.array(tables.seconds, dtype=np.float64)
        self._networks: dict[tuple[int, ...], list[tuple[Network, int]]] = {}
        self._shapes: dict[Any, int] = {}
        self._solved: dict[tuple[int, float, bytes], bytes] = {}

    def keep(self, price: float, cuts: tuple[int, ...] = ()) -> frozenset[int]:
        """The values to keep when a byte costs ``price`` seconds and segments begin at the ops ``cuts``."""
        kept: set[int] = set()
        for network, kind in self._segments(cuts):
            values = (*network.wanted, *network.inner, *network.outer)
            paid = bytes(v in kept for v in values)
            key = (kind, price, paid)
            if key not in self._solved:
                cut = network.solve(price, self._nbytes, self._seconds, frozenset(kept.intersection(values)))
                chosen = set(cut.kept)
                self._solved[key] = bytes(v in chosen for v in values)
            kept.update(v for v, yes in zip(values, self._solved[key], strict=True) if yes)
        return frozenset(kept)

    def prices(self, count: int) -> list[float]:
        """Prices from "keep nearly all" to "keep nearly nothing", dearest last: quantiles of seconds per byte."""
        t = self._tables
        ratios = sorted(
            t.ops[t.producer[v]].again_seconds / t.values[v].nbytes
            for v in t.droppable
            if t.ops[t.producer[v]].again_seconds > 0
        )
        if not ratios:
            return [1.0]
        low, high = ratios[len(ratios) // 50] / 2, ratios[-1 - len(ratios) // 50] * 8
        quantiles = [ratios[(2 * k + 1) * len(ratios) // (2 * count)] * 1.01 for k in range(count)]
        steps = [low * (high / low) ** (k / (count - 1)) for k in range(count)] if count > 1 else [high]
        return sorted({float(p) for p in (*quantiles, *steps)})

    def _segments(self, cuts: tuple[int, ...]) -> list[tuple[Network, int]]:
        """The networks of the segments, last one first, each with the number of its kind."""
        if cuts not in self._networks:
            home = segment_of(self._tables, cuts)
            ops: list[list[int]] = [[] for _ in range(len(cuts) + 1)]
            for i in self._tables.replayed:
                ops[home[i]].append(i)
            self._networks[cuts] = [(n, self._kind(n)) for n in map(self._network, reversed(ops)) if n.ops]
        return self._networks[cuts]

    def _network(self, ops: Sequence[int]) -> Network:
        t = self._tables
        last = len(t.late) - 1

        def free(v: int) -> bool:
            return t.until[v] >= last or bool(t.kept[v] and t.starts[v])

        return build(
            ops,
            lambda v: bool(t.starts[v]),
            free,
            lambda v: t.keepable[v] and v not in t.passing,
            lambda i: t.ops[i].writes,
            lambda i: t.reads[i],
            t.before,
        )

    def _kind(self, network: Network) -> int:
        weights = (
            tuple(self._tables.seconds[i] for i in network.ops),
            tuple(self._tables.values[v].nbytes for v in (*network.wanted, *network.inner, *network.outer)),
            network.shape,
        )
        return self._shapes.setdefault(weights, len(self._shapes))
