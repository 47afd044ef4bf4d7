"""What Inductor never writes to memory: pointwise operators that every reader computes for itself, inside its kernel.

Which buffers there are is known once Inductor has scheduled (``dry``); this is what a plan begins with. A node counts
as never written where all that read it are fused with it, and where computing it again reads little: so it is no op of
the program, and whoever reads it reads what it was made of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch.fx.node import Node

from autoremat.engines.torch.compiled.joint import Joint, facts_of_node, tensor_of
from autoremat.engines.torch.compiled.sizes import bytes_of
from autoremat.engines.torch.compiled.torch_names import is_fusible

_MOST_READ: Final = 2
"""Large memories that a node may be made of, and still not be written."""
_MOST_NODES: Final = 40
"""Nodes that may be computed for it."""
_LARGE: Final = 4
"""A memory counts as large from this part of what is made of it on."""


def fused(joint: Joint) -> Joint:
    """The same graph, with what is never written among its nodes that run wherever somebody reads them."""
    inlined: dict[Node, tuple[frozenset[Node], int]] = {}
    for node in joint.operators:
        if _may_be_inlined(joint, node) and (cone := _cone(joint, node, inlined)) is not None:
            inlined[node] = cone
    return replace(
        joint, inlined=frozenset(inlined), operators=tuple(n for n in joint.operators if n not in inlined)
    )  # fmt: skip


def is_fused(node: Node) -> bool:
    """Whether a node becomes a part of a kernel that Inductor writes itself."""
    return isinstance(node.target, torch._ops.OpOverload) and is_fusible(node)


def _may_be_inlined(joint: Joint, node: Node) -> bool:
    facts = facts_of_node(node)
    if facts is None or facts.random or tensor_of(node) is None or not is_fused(node):
        return False
    readers = _readers(joint, node)
    return torch.Tag.reduction not in node.target.tags and bool(readers) and all(map(is_fused, readers))  # type: ignore[union-attr]


def _readers(joint: Joint, node: Node) -> list[Node]:
    """Who reads what a node makes, through views."""
    found, left = list[Node](), list(node.users)
    while left:
        user = left.pop()
        if joint.is_view(user):
            left.extend(user.users)
        else:
            found.append(user)
    return found


def _cone(
    joint: Joint, node: Node, inlined: dict[Node, tuple[frozenset[Node], int]]
) -> tuple[frozenset[Node], int] | None:
    """What a node is computed from, through others that are not written, and how many these are; None: too much."""
    made_of, count = set[Node](), 1
    for root in joint.roots_of(node.all_input_nodes):
        if root in inlined:
            made_of |= inlined[root][0]
            count += inlined[root][1]
        else:
            made_of.add(root)
    tensor = tensor_of(node)
    if tensor is None or not joint.overwritten.isdisjoint(made_of):
        return None
    least = bytes_of(tensor)
    large = [n for n in made_of if (t := tensor_of(n)) is not None and bytes_of(t) * _LARGE >= least]
    return (frozenset(made_of), count) if len(large) <= _MOST_READ and count <= _MOST_NODES else None
