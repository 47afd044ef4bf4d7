"""A joint graph of AOTAutograd, read: which nodes are operators, which look at another's memory, which are late.

The graph is functional, but for copies into inputs at its end: so memory belongs to the node that makes it, and every
view of it can be taken anew wherever somebody reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from autoremat.engines.torch.compiled.torch_names import (
    Mark,
    input_of,
    is_made_again_by_hand,
    is_seed_or_offset,
    is_tangent,
    mark_of,
    mutated_input_of,
)
from autoremat.engines.torch.operators.facts import OpFacts, facts_of


class NotPlannable(Exception):
    """The graph has something that no program says; torch's own partitioner takes it."""


@dataclass(frozen=True)
class Joint:
    """The nodes of a joint graph, and what they are to each other.

    Attributes:
        module: the graph.
        nodes: in the order in which they stand, the output among them.
        root: for every node that is a tensor the node that makes its memory: an operator, one of an operator's results
            (``getitem``), or an input.
        operators: the nodes that run.
        late: those that belong to the backward.
        outputs: what the graph returns, flat; those of the forward first.
        n_forward_outputs: how many those are.
        overwritten: inputs that the step overwrites, in the graph or right after the forward.
        put_back: outputs of the forward that are copied into an input after it, and then gone.
        pinned: results that only the first run of their operator makes: of what it has been handed to update.
        inlined: nodes that make memory in name only: whoever reads one computes it for itself.
    """

    module: fx.GraphModule
    nodes: tuple[Node, ...]
    root: Mapping[Node, Node]
    operators: tuple[Node, ...]
    late: frozenset[Node]
    outputs: tuple[Any, ...]
    n_forward_outputs: int
    overwritten: frozenset[Node]
    put_back: frozenset[Node]
    pinned: frozenset[Node]
    inlined: frozenset[Node] = frozenset()

    @property
    def forward_outputs(self) -> tuple[Any, ...]:
        """What the forward returns."""
        return self.outputs[: self.n_forward_outputs]

    @property
    def backward_outputs(self) -> tuple[Any, ...]:
        """What the backward returns."""
        return self.outputs[self.n_forward_outputs :]

    def is_view(self, node: Node) -> bool:
        """Whether a node runs for free, wherever somebody reads it: another look at the memory of its root."""
        return self.root.get(node, node) is not node and not is_result(node, self.root)

    def is_free(self, node: Node) -> bool:
        """Whether a node is a view, or computed wherever somebody reads it."""
        return node in self.inlined or self.is_view(node)

    def memory_of(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The memory that is read where these nodes are, each once; inlined ones are computed there."""
        found, left = dict[Node, None](), list(self.roots_of(nodes))
        seen = set[Node]()
        while left:
            root = left.pop(0)
            if root in self.inlined:
                left += [n for n in self.roots_of(root.all_input_nodes) if n not in seen]
                seen.update(left)
            else:
                found[root] = None
        return tuple(found)

    def roots_of(self, nodes: Iterable[Node]) -> tuple[Node, ...]:
        """The memory that these nodes look at, each once."""
        return tuple(dict.fromkeys(self.root[n] for n in nodes if n in self.root))


def read_joint(module: fx.GraphModule, n_forward_outputs: int) -> Joint:
    """Read a joint graph. O(nodes + arguments).

    Raises:
        NotPlannable: it has regions of ``torch.utils.checkpoint``, higher-order operators, sizes that depend on data,
            random numbers as functions of seeds, or tensors whose memory cannot be seen.
    """
    nodes = tuple(module.graph.nodes)
    for node in nodes:
        _refuse(node)
    root = _roots(nodes)
    outputs = tuple(torch.utils._pytree.tree_leaves(nodes[-1].args[0]))
    put_back = _put_back(nodes[-1], outputs)
    overwritten = {root[n] for node in nodes for n in _written(node)}
    overwritten.update(node for node in nodes if input_of(node) in put_back.values())
    return Joint(
        module,
        nodes,
        root,
        tuple(n for n in nodes if n.op == "call_function" and not is_size(n) and not _is_free(n, root)),
        _late(nodes, outputs[:n_forward_outputs]),
        outputs,
        n_forward_outputs,
        frozenset(overwritten),
        frozenset(put_back),
        frozenset(node for node in nodes if is_result(node, root) and node.args[1] in _updated(node.args[0]).values()),
    )


def facts_of_node(node: Node) -> OpFacts | None:
    """What holds for the operator that a node calls; None where it calls none of torch's."""
    return facts_of(node.target) if isinstance(node.target, torch._ops.OpOverload) else None


def tensor_of(node: Node) -> Tensor | None:
    """The fake tensor that a node is; None where it is none."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_size(node: Node) -> bool:
    """Whether a node is a number: the size of a tensor, or made of such."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool)


def made_by(node: Node) -> tuple[Tensor, ...]:
    """The tensors that an operator returns, in order."""
    return tuple(t for t in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(t, Tensor))


def is_result(node: Node, root: Mapping[Node, Node]) -> bool:
    """Whether a node takes one of the results of an operator that makes several."""
    return node.target is operator.getitem and isinstance(node.args[0], Node) and node.args[0] not in root


def handed_on(node: Node) -> list[Node]:
    """The arguments that an operator only updates, without looking at them for its other results.

    Such are the running statistics of a batch norm in training: its schema returns each as ``<name>_out``.
    """
    given = _given(node)
    return [n for name in _updated(node) if isinstance(n := given.get(name), Node)]


def _updated(node: Any) -> dict[str, int]:
    """The names of those arguments, and the positions of the results that they come to."""
    if not isinstance(node.target, torch._ops.OpOverload) or _given(node).get("training", True) is False:
        return {}
    returned = {r.name: k for k, r in enumerate(node.target._schema.returns)}
    names = [a.name for a in node.target._schema.arguments]
    return {name: returned[f"{name}_out"] for name in names if f"{name}_out" in returned}


def _given(node: Node) -> dict[str, Any]:
    """The arguments of an operator by name."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _refuse(node: Node) -> None:
    """Say what no program can say of this node."""
    if is_made_again_by_hand(node):
        raise NotPlannable("it has regions of torch.utils.checkpoint, which torch's own partitioner carries out")
    if is_seed_or_offset(node):
        raise NotPlannable("its random numbers are functions of a seed (functionalize_rng_ops)")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise NotPlannable(f"it calls {node.target}, a higher-order operator, whose memory cannot be seen")
    for tensor in made_by(node):
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            raise NotPlannable(f"{node} is a tensor whose memory cannot be seen ({tensor.layout})")


def _roots(nodes: Sequence[Node]) -> dict[Node, Node]:
    """For every node that is a tensor, or several views of one, the node whose memory it looks at."""
    root: dict[Node, Node] = {}
    results: dict[tuple[Node, Any], Node] = {}
    for node in nodes:
        if node.target is operator.getitem and isinstance(source := node.args[0], Node):
            if source in root:
                root[node] = root[source]
            elif tensor_of(node) is not None:
                root[node] = results.setdefault((source, node.args[1]), node)
        elif tensor_of(node) is not None:
            root[node] = _base(node, root) or node
        elif made_by(node) and node.op == "call_function" and (base := _base(node, root)) is not None:
            root[node] = base
    return root


def _base(node: Node, root: Mapping[Node, Node]) -> Node | None:
    """The memory of another node that this one looks at; None where it makes its own.

    Its fake tensor says so, and for an operator that a pass of the compiler has put in, its schema.
    """
    given = [n for n in node.all_input_nodes if n in root]
    known = {_storage(t): root[n] for n in given if (t := tensor_of(n)) is not None}
    bases = [known.get(_storage(t)) for t in made_by(node)]
    facts = facts_of_node(node)
    if all(bases) and bases:
        return bases[0]
    if facts is not None and facts.is_view and given:
        return root[given[0]]
    if any(bases):
        raise NotPlannable(f"{node.target} returns views of what it reads beside what it makes")
    return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_free(node: Node, root: Mapping[Node, Node]) -> bool:
    """Whether a node makes nothing, changes nothing, and only looks at what is there."""
    if node.target is operator.getitem:
        return True
    facts = facts_of_node(node)
    writes = facts is not None and bool(facts.written_args or facts.written_kwargs)
    return root.get(node, node) is not node and not writes


def _late(nodes: Sequence[Node], forward_outputs: Iterable[Any]) -> frozenset[Node]:
    """The nodes of the backward: what is marked so, and what is not marked but reads it."""
    late: set[Node] = set()
    for node in nodes:
        mark = mark_of(node)
        reads_late = mark is Mark.NONE and any(n in late for n in node.all_input_nodes)
        if is_tangent(node) or mark is Mark.BACKWARD or reads_late:
            late.add(node)
    early = [n for n in forward_outputs if isinstance(n, Node)]
    while early:  # what the forward returns belongs to the forward
        node = early.pop()
        if node in late:
            late.discard(node)
            early.extend(node.all_input_nodes)
    return frozenset(late)


def _written(node: Node) -> Iterator[Node]:
    """The nodes whose memory a node overwrites."""
    facts = facts_of_node(node)
    if facts is None:
        return
    given = [node.args[i] for i in facts.written_args if i < len(node.args)]
    given += [node.kwargs[name] for name in facts.written_kwargs if name in node.kwargs]
    yield from (n for n in torch.utils._pytree.tree_leaves(given) if isinstance(n, Node))


def _put_back(output: Node, outputs: Sequence[Any]) -> dict[Node, Any]:
    """The outputs that are copied into an input after the forward, with the description of that input."""
    found = {}
    for node, what in zip(outputs, torch.utils._pytree.tree_leaves(output.meta.get("desc", ())), strict=False):
        if isinstance(node, Node) and (given := mutated_input_of(what)) is not None:
            found[node] = given
    return found
