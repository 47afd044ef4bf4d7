"""What Inductor would make of a plan: its own schedule of both halves, with its own estimate of the peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.node import Node

from autoremat.engines.torch.compiled.joint import tensor_of
from autoremat.engines.torch.compiled.partition import Halves
from autoremat.engines.torch.compiled.reading import costs_of_calls
from autoremat.engines.torch.compiled.sizes import bytes_of, laid_out, signature_of_node
from autoremat.engines.torch.compiled.torch_names import Step, is_tangent, scheduled
from autoremat.engines.torch.compiled.writing import OP
from autoremat.engines.torch.operators.costs import Cost
from autoremat.engines.torch.operators.signature import CallSignature
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
        costs: of operators that are called as they are, by op: on tensors as Inductor lays them out.
    """

    kernels: tuple[Kernel, ...]
    beside_bytes: int
    costs: Mapping[int, Cost] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most that is in memory at any moment."""
        return self.beside_bytes + max((k.nbytes for k in self.kernels), default=0)

    @property
    def at_peak(self) -> Kernel | None:
        """The kernel at which the peak stands."""
        return max(self.kernels, key=lambda k: k.nbytes, default=None)


def dry_schedule(halves: Halves, program: Program, given: dict[str, Any]) -> DrySchedule:
    """How Inductor would run two halves; a third of the time that compiling them takes, and nothing is compiled.

    Operators that Inductor calls as they are take scratch, of which it knows nothing. They are measured on tensors that
    lie in memory as it lays them out: a convolution takes far less where channels come last.

    Args:
        halves: of a joint graph that was written for the program.
        program: has the scratch of operators whose layouts are not known.
        given: what the partitioner was given.
    """
    forward, backward = halves
    static = given.get("static_lifetime_input_indices") or ()
    first = scheduled(forward, static, is_backward=False, n_visible=given["num_fwd_outputs"])
    second = scheduled(
        backward, _fixed_inputs(backward), is_backward=True, strides=first.strides,
        handed_over=_handed_over(halves, given["num_fwd_outputs"]),
    )  # fmt: skip
    steps, beside = [*first.steps, *second.steps], first.copied_bytes + _held_bytes(halves, given)
    costs = costs_of_calls([_called(step) for step in steps])
    kernels, known = list[Kernel](), dict[int, Cost]()
    for k, (step, cost) in enumerate(zip(steps, costs, strict=True)):
        ops, scratch = _ops(step.nodes), 0
        if step.layouts is not None:
            scratch = max((program.ops[i].scratch_bytes for i in ops), default=0)
            if cost.has_run and len(ops) == 1:
                scratch = cost.scratch_bytes
                known[ops[0]] = max(known.get(ops[0], cost), cost, key=lambda c: c.scratch_bytes)
        is_late = k >= len(first.steps)
        kernels.append(Kernel(step.nbytes + scratch + is_late * beside, ops, is_late))
    return DrySchedule(tuple(kernels), program.fixed_bytes, known)


def _held_bytes(halves: Halves, given: dict[str, Any]) -> int:
    """What the caller holds during the backward: results of the forward, beside what is read, and their gradients."""
    forward, backward = halves
    output: Any = forward.graph.output_node().args[0]
    read = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    returned = [n for n in output[: given["num_fwd_outputs"]] if isinstance(n, Node) and n.op != "placeholder"]
    held = [*(n for n in returned if n.name not in read), *filter(is_tangent, read.values())]
    tensors = [t for t in map(tensor_of, held) if t is not None]
    return sum({t.untyped_storage()._cdata: bytes_of(t) for t in tensors}.values())


def _called(step: Step) -> CallSignature | None:
    """The call of an operator that Inductor calls as it is; None where it is not known how its tensors lie."""
    if not step.layouts or len(step.nodes) != 1:
        return None
    call = signature_of_node(step.nodes[0])
    return None if call is None else laid_out(call, step.layouts)


def _fixed_inputs(module: fx.GraphModule) -> Sequence[int]:
    """The positions of a backward's inputs that are inputs of the step as well, and so stay."""
    inputs = module.graph.find_nodes(op="placeholder")
    return [k for k, node in enumerate(inputs) if "primals" in str(node.target)]


def _handed_over(halves: Halves, n_visible: int) -> list[int]:
    """The positions of the backward's inputs whose memory is neither the step's own, nor returned by either half."""
    forward, backward = halves
    made: Any = forward.graph.output_node().args[0]
    returned: Any = (*made[:n_visible], *backward.graph.output_node().args[0])  # type: ignore[misc]
    others = {_memory(n) for n in (*forward.graph.find_nodes(op="placeholder"), *returned)}
    kept = {n.name for n in made[n_visible:] if isinstance(n, Node)}
    inputs = enumerate(backward.graph.find_nodes(op="placeholder"))
    return [k for k, n in inputs if n.name in kept and _memory(n) is not None and _memory(n) not in others]


def _memory(node: Any) -> int | None:
    """Tells the memory of a tensor from that of others."""
    tensor = tensor_of(node) if isinstance(node, Node) else None
    return None if tensor is None else tensor.untyped_storage()._cdata


def _ops(nodes: Sequence[Node]) -> tuple[int, ...]:
    return tuple(sorted({i for node in nodes if (i := node.meta.get(OP, -1)) >= 0}))
