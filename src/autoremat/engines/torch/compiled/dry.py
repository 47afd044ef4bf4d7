"""What Inductor would make of a plan: its own schedule of both halves, with its own estimate of the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import Node

from autoremat.engines.torch.compiled.partition import Halves
from autoremat.engines.torch.compiled.torch_names import scheduled
from autoremat.engines.torch.compiled.writing import OP
from autoremat.program import Program


@dataclass(frozen=True)
class Kernel:
    """One kernel that Inductor would run.

    Attributes:
        nbytes: in memory while it runs: what Inductor allocates, inputs that it frees, scratch of operators inside.
        ops: the ops of the program that it computes.
        is_late: whether it belongs to the backward.
    """

    nbytes: int
    ops: tuple[int, ...]
    is_late: bool


@dataclass(frozen=True)
class DrySchedule:
    """The kernels of both halves, in order.

    Attributes:
        kernels: those of the forward first.
        beside_bytes: what is in memory during all of them.
    """

    kernels: tuple[Kernel, ...]
    beside_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is in memory at any moment."""
        return self.beside_bytes + max((k.nbytes for k in self.kernels), default=0)

    @property
    def at_peak(self) -> Kernel | None:
        """The kernel at which the peak stands."""
        return max(self.kernels, key=lambda k: k.nbytes, default=None)


def dry_schedule(halves: Halves, program: Program, given: dict[str, Any]) -> DrySchedule:
    """How Inductor would run two halves; a third of the time that compiling them takes, and nothing is generated.

    Args:
        halves: of a joint graph that was written for the program.
        program: has the scratch of operators that Inductor calls as they are, which it does not know.
        given: what the partitioner was given.
    """
    kernels = list[Kernel]()
    for is_late, module in enumerate(halves):
        static = given.get("static_lifetime_input_indices") or () if not is_late else _fixed_inputs(module)
        for nbytes, nodes, is_alone in scheduled(module, static, is_backward=bool(is_late)):
            ops = _ops(nodes)
            scratch = max((program.ops[i].scratch_bytes for i in ops), default=0) if is_alone else 0
            kernels.append(Kernel(nbytes + scratch, ops, bool(is_late)))
    return DrySchedule(tuple(kernels), program.fixed_bytes)


def _fixed_inputs(module: fx.GraphModule) -> Sequence[int]:
    """The positions of a backward's inputs that are inputs of the step as well, and so stay."""
    inputs = module.graph.find_nodes(op="placeholder")
    return [k for k, node in enumerate(inputs) if "primals" in str(node.target)]


def _ops(nodes: Sequence[Node]) -> tuple[int, ...]:
    return tuple(sorted({i for node in nodes if (i := node.meta.get(OP, -1)) >= 0}))
