"""Plan to joint graph: every further run of an op is a copy of its node, at its place in the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import fx
from torch.fx.node import Node

from autoremat.engines.torch.compiled.joint import Joint, is_result, is_size
from autoremat.engines.torch.compiled.reading import TANGENTS, Reading
from autoremat.engines.torch.compiled.torch_names import AGAIN, PLACE, Mark, forget_how_to_recompute, put_mark
from autoremat.program import Schedule

OP: Final = "autoremat_op"
"""Key of a node's ``meta`` under which stands which op of the program it was written for."""


def write_joint(reading: Reading, schedule: Schedule) -> fx.GraphModule:
    """The joint graph that runs as a schedule says: the forward, then the backward. O(runs + arguments).

    What a node reads is the latest copy there is. Views are taken anew in each half, so that what stays for the
    backward is memory that an op has made, and never a second look at it.
    """
    writer = _Writer(reading)
    for i in schedule.order:
        writer.run(i)
    graph = writer.finished()
    module = fx.GraphModule(reading.joint.module, graph)
    module.meta = dict(reading.joint.module.meta)
    graph.lint()
    return module


class _Writer:
    """Writes a graph run by run."""

    def __init__(self, reading: Reading) -> None:
        self._joint, self._program, self._nodes = reading.joint, reading.program, reading.nodes
        self._graph = fx.Graph()
        self._is_late = False
        self._op, self._place, self._is_again = -1, -1, False
        self._latest: dict[Node, Node] = {}
        """Of every operator, result, input and size its latest copy."""
        self._views: dict[Node, tuple[tuple[Node, ...], Node]] = {}
        """Of every view taken in this half the copies that it looks at, and its own."""
        self._results = _results(self._joint)
        self._forward_outputs: list[Any] = []
        for node in self._joint.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._latest[node] = self._graph.node_copy(node, self._latest.__getitem__)

    def run(self, i: int) -> None:
        """One run of an op."""
        node, self._op, self._place = self._nodes[i], i, self._place + 1
        self._is_again = node in self._latest
        if node is None:
            if self._program.ops[i].name == TANGENTS:
                self._backward_begins()
            return
        self._latest[node] = self._copied(node)
        for result in self._results.get(node, ()):
            if result not in self._joint.pinned or result not in self._latest:
                self._latest[result] = self._copied(result)

    def _backward_begins(self) -> None:
        self._forward_outputs = [self._of(x) for x in self._joint.forward_outputs]
        self._is_late = True
        self._views.clear()

    def finished(self) -> fx.Graph:
        """The graph, with its output."""
        outputs = [*self._forward_outputs, *map(self._of, self._joint.backward_outputs)]
        last = self._joint.nodes[-1]
        self._graph.output(tuple(outputs)).meta = dict(last.meta)
        return self._graph

    def _of(self, thing: Any) -> Any:
        return self._read(thing) if isinstance(thing, Node) else thing

    def _read(self, node: Node) -> Node:
        """The copy of a node that is to be read now."""
        root = self._joint.root.get(node, node)
        if is_result(node, self._joint.root):
            return self._latest[root]
        if node in self._latest:
            return self._latest[node]
        if is_size(node):
            self._latest[node] = self._copied(node)
            return self._latest[node]
        if not self._joint.is_free(node):
            raise KeyError(f"{node} is read before it has run")
        looks_at = tuple(map(self._read, node.all_input_nodes))
        known = self._views.get(node)
        if known is None or known[0] != looks_at:
            known = self._views[node] = looks_at, self._copied(node)
        return known[1]

    def _copied(self, node: Node) -> Node:
        read: Callable[[Node], Node] = self._read
        arguments = {n: read(n) for n in node.all_input_nodes}  # first: they may have to be copied themselves
        copy = self._graph.node_copy(node, arguments.__getitem__)
        copy.meta = dict(node.meta) | {OP: self._op, PLACE: self._place, AGAIN: self._is_again}
        put_mark(copy, Mark.BACKWARD if self._is_late else Mark.FORWARD)
        forget_how_to_recompute(copy)
        return copy


def _results(joint: Joint) -> dict[Node, list[Node]]:
    """For every operator that makes several tensors the nodes that take one each."""
    found: dict[Node, list[Node]] = {}
    for node, root in joint.root.items():
        if node is root and is_result(node, joint.root):
            found.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    return found
