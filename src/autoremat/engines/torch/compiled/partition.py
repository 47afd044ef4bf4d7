"""A planned joint graph, split in two by torch's ``default_partition``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from functorch.compile import default_partition
from torch import fx
from torch.fx.node import Node

from autoremat.engines.torch.compiled.joint import facts_of_node
from autoremat.engines.torch.compiled.reading import Reading
from autoremat.engines.torch.compiled.torch_names import Mark, mark_of
from autoremat.engines.torch.compiled.writing import write_joint
from autoremat.program import Schedule

Halves = tuple[fx.GraphModule, fx.GraphModule]
"""The graph of the forward and that of the backward."""
Partitioner = Callable[..., Halves]


def split(reading: Reading, schedule: Schedule, joint_inputs: Sequence[object], **given: Any) -> Halves:
    """The two graphs that run as a schedule says.

    Args:
        reading: the joint graph.
        schedule: of its program.
        joint_inputs: as a partitioner is given them.
        **given: what else a partitioner is given.

    Raises:
        RuntimeError: the backward would draw random numbers that the forward has drawn.
    """
    halves = default_partition(write_joint(reading, schedule), joint_inputs, **given)
    forward, backward = halves
    _drop_drawn(backward)
    if both := drawn_twice(forward, backward):
        raise RuntimeError(f"random numbers of the forward would be drawn again in the backward: {', '.join(both)}")
    return forward, backward


def drawn_twice(forward: fx.GraphModule, backward: fx.GraphModule) -> list[str]:
    """The random operators of the forward that stand in the backward as well."""
    drawn = {node.name for node in forward.graph.nodes if _draws(node)}
    return [node.name for node in backward.graph.nodes if _draws(node) and node.name in drawn]


def _drop_drawn(backward: fx.GraphModule) -> None:
    """Take from the backward the random operators of the forward of which nobody reads anything.

    ``default_partition`` copies into the backward whatever could run there, and leaves dead ones that are random: they
    would move the generator.
    """
    for node in reversed(backward.graph.nodes):
        is_drawn = _draws(node) and mark_of(node) is not Mark.BACKWARD
        if not node.users and (is_drawn or node.target is operator.getitem):
            backward.graph.erase_node(node)
    backward.recompile()


def _draws(node: Node) -> bool:
    facts = facts_of_node(node)
    return facts is not None and facts.random
