"""Joint graph to program: an op for every operator, a value for every memory that one makes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch.fx.node import Node

from autoremat.engines.torch.compiled.joint import Joint, facts_of_node, handed_on, made_by, tensor_of
from autoremat.engines.torch.compiled.naming import Names, line_of, module_of
from autoremat.engines.torch.compiled.sizes import bytes_of, number_of, signature_of_node
from autoremat.engines.torch.operators.costs import Cost
from autoremat.engines.torch.operators.signature import CallSignature
from autoremat.engines.torch.operators.storages import without_beyond
from autoremat.engines.torch.operators.timing import estimate_all, measure_all
from autoremat.program import END, Abilities, Once, Op, Program, Value
from autoremat.program.once import Reason

TANGENTS: Final = "tangents"
"""Name of the op that stands where the backward begins: it is given the gradients of what the forward has returned."""


def never(node: Node) -> bool:
    """Of a backend that fuses nothing: whether a node is fused."""
    return False


@dataclass(frozen=True)
class Reading:
    """A joint graph as a program.

    Attributes:
        joint: the graph.
        program: its operators, those of the forward first.
        nodes: for every op its node; None for the one that opens the backward, and for the optimizer's step.
        value: for every node that makes memory its value in the program.
        estimates: for every op the seconds that it takes by a formula: the same ones in every process.
    """

    joint: Joint
    program: Program
    nodes: tuple[Node | None, ...]
    value: Mapping[Node, int]
    estimates: tuple[float, ...]

    def by_formula(self, program: Program) -> Program:
        """A program of the same operators, with seconds that are not measured; what is planned for it is repeatable."""
        both = zip(program.ops, self.estimates, strict=True)
        return replace(program, ops=tuple(replace(op, seconds=seconds) for op, seconds in both))


def read_program(
    joint: Joint, name: str, names: Names, beside: Iterable[Value] = (), is_fused: Callable[[Node], bool] = never
) -> Reading:
    """The program of a joint graph, operators measured. O(nodes + arguments), beside measuring.

    Args:
        joint: the graph.
        name: of the program.
        names: what its inputs are called.
        beside: what else is there during the whole step.
        is_fused: whether the backend makes an operator a part of a kernel that it writes itself.

    Raises:
        NotPlannable: a size depends on data.
    """
    values = _Values(joint, names)
    ops, nodes = list[Op](), list[Node | None]()
    ordered = [n for n in joint.operators if n not in joint.late] + [n for n in joint.operators if n in joint.late]
    begins = sum(n not in joint.late for n in joint.operators)
    estimates = estimates_of(ordered)
    costs = costs_of(ordered, estimates, is_fused)
    for node, cost in zip(ordered, costs, strict=True):
        if len(ops) == begins:
            ops.append(values.backward_begins())
            nodes.append(None)
        ops.append(_op(joint, values, node, cost))
        nodes.append(node)
    if len(ops) == begins:
        ops.append(values.backward_begins())
        nodes.append(None)
    seconds = [e.seconds for e in estimates]
    total, timed = sum(c.seconds for c in costs), sum(c.seconds for c in costs if c.runs)
    abilities = Abilities("anywhere", ordered=is_fused is never)
    program = Program(
        name, (*values.held(ops, begins), *beside), tuple(ops), recorded="fake", abilities=abilities,
        timing="measured" if timed else "estimated", measured_share=timed / total if total else 0.0,
    )  # fmt: skip
    return Reading(joint, program, tuple(nodes), values.index, (*seconds[:begins], 0.0, *seconds[begins:]))


def with_optimizer(reading: Reading, scratch_bytes: int) -> Reading:
    """The same, with what the optimizer's step takes beside gradients and state as a last op; it has no node."""
    if not scratch_bytes:
        return reading
    step = Op("optimizer step", (), (), 0.0, scratch_bytes, "backward", Once.BACKWARD, kind="step")
    program = replace(reading.program, ops=(*reading.program.ops, step))
    return replace(reading, program=program, nodes=(*reading.nodes, None), estimates=(*reading.estimates, 0.0))


def costs_of(nodes: Sequence[Node], estimates: Sequence[Cost], is_fused: Callable[[Node], bool]) -> list[Cost]:
    """What operators take: measured, but for those that no kernel of theirs runs; these move memory."""
    fused = [is_fused(node) for node in nodes]
    measured = costs_of_calls(
        [None if is_one else signature_of_node(n) for n, is_one in zip(nodes, fused, strict=True)]
    )
    return [e if is_one else m for m, e, is_one in zip(measured, estimates, fused, strict=True)]


def estimates_of(nodes: Sequence[Node]) -> list[Cost]:
    """What operators take by a formula."""
    return estimate_all(list(map(signature_of_node, nodes)), [sum(map(bytes_of, made_by(node))) for node in nodes])


def costs_of_calls(calls: Sequence[CallSignature | None]) -> list[Cost]:
    """What calls of operators take, measured; None takes nothing.

    In a thread of its own, where nothing is switched on: neither the compiler nor fake tensors.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: measure_all([c and without_beyond(c) for c in calls])).result()


class _Values:
    """The values of a program, numbered in the order in which they are met."""

    def __init__(self, joint: Joint, names: Names) -> None:
        self._joint, self._names = joint, names
        self._taken: Counter[str] = Counter()
        self.index: dict[Node, int] = {}
        self._values: list[Value] = []
        self._results: dict[Node, dict[int, Node]] = {}
        for node, root in joint.root.items():
            if node is root and node.target is operator.getitem:
                self._results.setdefault(node.args[0], {})[int(node.args[1])] = node  # type: ignore[arg-type]
            elif node is root and node.op != "call_function" and node not in joint.late:
                self._outside(node)

    def _outside(self, node: Node) -> None:
        name, kind = self._names.of_input(node) if node.op == "placeholder" else (str(node.target), "constant")
        self._add(node, name, node, fixed=True, kind=kind)

    def _add(self, root: Node | None, name: str, node: Node, k: int = 0, **about: Any) -> int:
        """A value for memory that a node makes: its k-th tensor."""
        self._taken[name] += 1
        times = self._taken[name]
        tensor = made_by(node)[k]
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(map(number_of, tensor.shape))
        unique = name if times == 1 else f"{name}.{times}"
        label = f"{name} {dtype}{list(shape)}"
        self._values.append(Value(unique, bytes_of(tensor), label=label, dtype=dtype, shape=shape, **about))
        if root is not None:
            self.index[root] = len(self._values) - 1
        return len(self._values) - 1

    def backward_begins(self) -> Op:
        """The op that is given the gradients of the outputs; their memory is the caller's until the end."""
        given = [n for n in self._joint.nodes if n in self._joint.late and n.op == "placeholder"]
        tensors = [n for n in given if self._joint.root.get(n) is n]
        written = tuple(self._add(n, str(n.target), n, held=END, kind="gradient") for n in tensors)
        return Op(TANGENTS, (), written, phase="backward", once=Once.BACKWARD)

    def written(self, node: Node, module: str, made: Sequence[int]) -> tuple[int, ...]:
        """The values that an operator writes; ``made``: their bytes where it has been run."""
        joint = self._joint
        if joint.root.get(node, node) is not node:
            return ()
        name = ".".join(filter(None, (module, str(node.target).removeprefix("aten.").partition(".")[0])))
        kind = "temporary" if node in joint.late else "activation"
        if tensor_of(node) is not None:
            found = [self._add(node, name, node, kind=kind)]
        else:
            roots, places = self._results.get(node, {}), _places(node)
            found = [self._add(roots.get(place), name, node, k, kind=kind) for k, place in enumerate(places)]
        if len(made) == len(found):
            for v, nbytes in zip(found, made, strict=True):
                self._values[v] = replace(self._values[v], nbytes=nbytes)
        return tuple(found)

    def held(self, ops: Sequence[Op], n_forward: int) -> tuple[Value, ...]:
        """All values; those that the graph returns stay, unless they are copied into an input at once."""
        joint, values = self._joint, list(self._values)
        for k, node in enumerate(joint.outputs):
            root = joint.root.get(node) if isinstance(node, Node) else None
            v = self.index.get(root) if root is not None else None
            if v is None or values[v].fixed or values[v].held == END:
                continue
            until = n_forward - 1 if node in joint.put_back and k < joint.n_forward_outputs else END
            values[v] = replace(values[v], held=until)
        for node in joint.pinned:
            if (v := self.index.get(node)) is not None and values[v].held is None:
                values[v] = replace(values[v], held=max((i for i, op in enumerate(ops) if v in op.reads), default=None))
        return self._gradients(values)

    def _gradients(self, values: list[Value]) -> tuple[Value, ...]:
        """The same, gradients by the names of what they are gradients of."""
        joint = self._joint
        about = torch.utils._pytree.tree_leaves(joint.nodes[-1].meta.get("desc", ()))[joint.n_forward_outputs :]
        for node, description in zip(joint.backward_outputs, about, strict=False):
            name = self._names.of_gradient(description)
            v = self.index.get(joint.root.get(node, node)) if isinstance(node, Node) else None
            if not name or v is None or values[v].fixed or values[v].kind == "gradient" or self._taken[name]:
                continue
            self._taken[name] += 1
            label = values[v].label.partition(" ")
            values[v] = replace(values[v], id=name, kind="gradient", label=f"{name} {label[2]}")
        return tuple(values)


def _op(joint: Joint, values: _Values, node: Node, cost: Cost) -> Op:
    module = module_of(node)
    reads = tuple(values.index[root] for root in joint.memory_of(node.all_input_nodes) if root in values.index)
    reason = _reason(joint, node)
    return Op(
        str(node.target),
        reads,
        values.written(node, module, cost.made_bytes),
        cost.seconds,
        cost.scratch_bytes,
        "backward" if node in joint.late else "forward",
        None if reason is None else reason.once,
        note="" if reason is None else reason.note,
        module=module,
        source=line_of(node),
    )


def _places(node: Node) -> list[int]:
    """The positions of the tensors among an operator's results."""
    return [k for k, t in enumerate(node.meta["val"]) if isinstance(t, torch.Tensor)] if made_by(node) else []


def _reason(joint: Joint, node: Node) -> Reason | None:
    """Why an operator must not run again; None where it may."""
    facts = facts_of_node(node)
    if node in joint.late:
        return Reason(Once.BACKWARD)
    if facts is None:
        return Reason(Once.GIVEN, "is not an operator of torch")
    if facts.once is not None:
        return facts.once
    if facts.random:
        return Reason(Once.GIVEN, "draws random numbers")
    if facts.written_args or facts.written_kwargs:
        return Reason(Once.OVERWRITES, "an input")
    if facts.uninitialised:
        return Reason(Once.UNINITIALISED)
    if node.is_impure():
        return Reason(Once.EFFECT)
    stale = set(joint.memory_of(node.all_input_nodes)) & joint.overwritten
    stale -= set(joint.roots_of(handed_on(node)))
    return Reason(Once.READS_OVERWRITTEN, str(min(stale, key=str).target)) if stale else None
