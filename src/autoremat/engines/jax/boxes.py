"""What a function may change in its arguments: the variables of Flax NNX, which hold an array each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, eq=False)
class Box:
    """A variable, and the leaves of the arguments that are in it.

    Attributes:
        variable: the user's own.
        leaves: their positions.
        is_shared: whether the arguments hold the same one at another place, too.
    """

    variable: Any
    leaves: range
    is_shared: bool

    def put(self, new: Mapping[int, Any]) -> None:
        """Have new values where there are some."""
        old, tree = jax.tree.flatten(self.variable)
        leaves = [new.get(k, leaf) for k, leaf in zip(self.leaves, old, strict=True)]
        self.variable.update_from_state(jax.tree.unflatten(tree, leaves))


def boxes_of(tree: Any) -> tuple[Box, ...]:
    """The variables in arguments; none where Flax NNX has not been imported."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return ()
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    found, position, seen = list[tuple[Any, range]](), 0, dict[int, int]()
    for node in nodes:
        n = len(jax.tree.leaves(node))
        if isinstance(node, nnx.Variable):
            found.append((node, range(position, position + n)))
            seen[id(node)] = seen.get(id(node), 0) + 1
        position += n
    return tuple(Box(variable, leaves, seen[id(variable)] > 1) for variable, leaves in found)
