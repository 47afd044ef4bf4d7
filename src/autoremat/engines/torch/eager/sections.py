"""Sections: user code that runs in the backward.

These are backwards of custom Functions, and hooks on tensors. A recording does not run them. In the first step's own
backward their calls are heard, and repeated on the twins, so that it is known what they take; from the second step on
that is in the plan. User code runs when the user runs it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, update_wrapper
from itertools import accumulate
from operator import add
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import tensors_given, tensors_in
from autoremat.engines.torch.eager.calls import is_out_of_sight, is_pass, name_of, only_looks
from autoremat.engines.torch.eager.listener import Listener
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.operators.history import node_made
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.timing import measure_all
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.recording import RecordedOp, RecordedValue
from autoremat.program import END, Program, Value


@dataclass(frozen=True)
class Taken:
    """What a section takes on top of what exists when it begins.

    Attributes:
        op: the op of the program that stands for it.
        peak_bytes: at most.
        left_bytes: what of that is left when the section is over, apart from the gradients that it gives.
        asked: values of the forward that the section's own passes ask for.
    """

    op: int
    peak_bytes: int
    left_bytes: int
    asked: frozenset[int]


@dataclass
class _Section:
    """The section that runs now.

    Attributes:
        key: of the node or the hook.
        first_op: the recorder's number of the first op in it.
        first_value: the same of the first value.
        task: the pass that it is part of.
        graph: the nodes whose twins had a history before.
        zeros_bytes: of the gradients that autograd has made for it, because none came.
        asked: values of the forward that other passes have asked for.
        failed: something in it cannot be done on fake tensors.
    """

    key: int
    first_op: int
    first_value: int
    task: int
    graph: frozenset[tuple[int, int]]
    zeros_bytes: int
    asked: set[int] = field(default_factory=set)
    failed: bool = False


class Sections:
    """Listens to the sections of one backward.

    Args:
        shadow: of the step; its recording of the backward is over by then.
    """

    def __init__(self, shadow: Shadow) -> None:
        self._recording: Shadow | None = shadow
        self._shadow: Shadow | None = None
        """The shadow, while there are sections to come."""
        self._listener = Listener(self._heard)
        self._section: _Section | None = None
        self._taken: dict[int, Taken] = {}
        self._arrived: dict[int, tuple[bool, ...]] = {}
        """Which gradients a custom Function's node has got, by its key; autograd makes zeros for the others."""
        self._n_hooks = self._n_over = 0
        shadow.graph.met = self._met

    # ---- which there are -----------------------------------------------------------------------------------------

    def _met(self, node: Any) -> int:
        """Take over a custom Function's backward; return the node's key."""
        key = int(node._sequence_nr())
        for name in ("apply", "apply_boxed"):
            if hasattr(type(node), name):
                setattr(node, name, partial(self._applied, weakref.ref(node), key, name))
        node.register_prehook(partial(self._arrive, key))
        return key

    def _arrive(self, key: int, gradients: Sequence[Any]) -> None:
        self._arrived[key] = tuple(g is not None for g in gradients)

    def _applied(self, reference: weakref.ref[Any], key: int, name: str, *gradients: Any) -> Any:
        node = reference()
        return self._run(key, partial(getattr(type(node), name), node), gradients)

    def hooked(self, tensor: Any, hook: Any) -> Any:
        """Return what to register in place of a hook on a tensor.

        A leaf gets the user's hook as it is: it would have ours for longer than the step.
        """
        if self._recording is None or not isinstance(tensor, Tensor) or node_made(tensor) is None or not callable(hook):
            return hook
        self._n_hooks += 1
        key = -self._n_hooks
        if not self._recording.graph.hook(key, tensor):
            return hook
        return update_wrapper(lambda *gradients: self._run(key, hook, gradients), hook)

    # ---- listening -----------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Tell whether sections come, now that the backward is recorded."""
        shadow, self._recording = self._recording, None
        if shadow is None or not shadow.graph.marks:
            return False
        shadow.graph.met, self._shadow = None, shadow
        return True

    def close(self) -> tuple[Taken, ...]:
        """End the step; return what its sections took."""
        self._shadow = None
        return tuple(self._taken.values())

    def gone(self, pack: int) -> None:
        """Do nothing: what a pass no longer needs is no news."""

    def asked(self, value: int) -> None:
        """Note that a pass asks for a value of the forward."""
        if self._section is not None and torch._C._current_graph_task_id() != self._section.task:
            self._section.asked.add(value)

    def _run(self, key: int, func: Callable[..., Any], gradients: Sequence[Any]) -> Any:
        shadow = self._shadow
        if shadow is None or self._section is not None or key in self._taken or key not in shadow.graph.marks:
            return func(*gradients)
        recorder = shadow.recorder
        task = torch._C._current_graph_task_id()
        zeros = self._zeros_bytes(key, gradients)
        self._section = section = _Section(key, len(recorder.ops), recorder.map.made, task, shadow.graph.known(), zeros)
        try:
            with _in_forward(shadow), self._listener:
                out = func(*gradients)
            with torch._C.DisableTorchFunction():
                if not section.failed:
                    self._taken[key] = self._over(shadow, section, out)
            return out
        finally:
            self._section = None
            self._n_over += 1
            if self._n_over == len(shadow.graph.marks):
                self._shadow = None

    def _zeros_bytes(self, key: int, gradients: Sequence[Any]) -> int:
        """Return the bytes of the gradients that no node has given."""
        arrived = self._arrived.pop(key, (True,) * len(gradients))
        made = {s._cdata: s.nbytes() for g, came in zip(gradients, arrived, strict=False)
                if isinstance(g, Tensor) and not came and (s := storage_of(local_of(g)))}  # fmt: skip
        return sum(made.values())

    def _heard(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shadow, section = self._shadow, self._section
        name = name_of(func)
        if shadow is None or section is None or section.failed or only_looks(func, name) or is_out_of_sight():
            return func(*args, **kwargs)
        if self._listener.is_made_of_others(func):
            return self._listener.look_into(func, args, kwargs)
        with _failing(section):
            for tensor in tensors_given(args, kwargs):
                shadow.twin(tensor)
            if is_pass(func, name):
                shadow.twins.know_no_gradients()
        out = func(*args, **kwargs)
        if not section.failed:
            with _failing(section):
                shadow.make(func, args, kwargs, out, (), -1)
        return out

    def _over(self, shadow: Shadow, section: _Section, out: Any) -> Taken:
        shadow.forget_graph(section.graph)
        recorder, first = shadow.recorder, section.first_value
        given = {recorder.map.number(s) for t in tensors_in(out) if (s := storage_of(local_of(shadow.twin(t))))}
        left = {n for n in recorder.storages.living() if n >= first} - given
        ops, values = recorder.ops[section.first_op :], recorder.values
        peak = peak_bytes(ops, values, section.first_op, first)
        left_bytes = sum(values[n].nbytes for n in left)
        room = peak - left_bytes - sum(values[n].nbytes for n in given if n >= first)
        inside = peak_bytes(ops, values, section.first_op, first, scratch=_scratch_of(ops, values, room))
        return Taken(
            shadow.graph.marks[section.key], section.zeros_bytes + inside, left_bytes, frozenset(section.asked)
        )  # fmt: skip


@contextmanager
def _failing(section: _Section) -> Iterator[None]:
    """Open a block on fake tensors; its failure is the section's."""
    try:
        with torch._C.DisableTorchFunction():
            yield
    except Exception:  # noqa: BLE001 - whatever a fake tensor cannot do
        section.failed = True


@contextmanager
def _in_forward(shadow: Shadow) -> Iterator[None]:
    """Record what happens in this block as no part of the backward."""
    shadow.recorder.backward = False
    try:
        yield
    finally:
        shadow.recorder.backward = True


def _scratch_of(ops: Sequence[RecordedOp], values: Mapping[int, RecordedValue], room_bytes: int) -> list[int]:
    """Return what kernels take inside; run those with room."""
    written = [sum(values[n].nbytes for n in op.writes) for op in ops]
    costs = measure_all([op.signature for op in ops], room_bytes=room_bytes, most_bytes=room_bytes, outputs=written)
    return [cost.scratch_bytes for cost in costs]


def peak_bytes(
    ops: Sequence[RecordedOp], values: Mapping[int, RecordedValue], begin: int, first: int,
    scratch: Sequence[int] = (),
) -> int:  # fmt: skip
    """Return the most that new values take while these ops run.

    Args:
        ops: of a section.
        values: by number.
        begin: number of the first op.
        first: number of the first value that counts.
        scratch: what each op's kernel takes inside.
    """
    born: dict[int, int] = {}
    ends: dict[int, int] = {}
    for i, op in enumerate(ops):
        for n in op.writes:
            born[n] = i
        for n in (*op.reads, *op.writes):
            ends[n] = i
        for _, old in op.in_place:
            ends[old] = i - 1
    change = [0] * (len(ops) + 1)
    for n, i in born.items():
        if n < first:
            continue
        died = values[n].died
        is_taken_over = ends[n] < i or any(old == n for op in ops for _, old in op.in_place)
        end = ends[n] if is_taken_over else len(ops) - 1 if died is None else max(ends[n], died - 1 - begin)
        change[i] += values[n].nbytes
        change[min(end, len(ops) - 1) + 1] -= values[n].nbytes
    alive = list(accumulate(change))
    return max([0, *alive, *map(add, alive, scratch)])


def with_taken(program: Program, taken: Collection[Taken]) -> Program:
    """Return the program with what its sections take."""
    made = [i for i, v in enumerate(program.values) if not v.fixed]
    values, ops = list(program.values), list(program.ops)
    for section in taken:
        op = ops[section.op]
        for n in section.asked:
            if n < len(made) and (held := values[made[n]].held) != END:
                values[made[n]] = replace(values[made[n]], held=max(-1 if held is None else held, section.op))
        writes = op.writes
        if section.left_bytes:
            label = f"left by {op.name}"
            values.append(Value(f"left{section.op}", section.left_bytes, held=END, label=label, kind="gradient"))
            writes = (*writes, len(values) - 1)
        scratch_bytes = section.peak_bytes - section.left_bytes
        ops[section.op] = replace(op, writes=writes, scratch_bytes=max(0, scratch_bytes))
    return replace(program, values=tuple(values), ops=tuple(ops))
