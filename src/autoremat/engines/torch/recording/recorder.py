"""The recorder: sees every operator of a step, and every storage's death.

It works below autograd and autocast (a ``TorchDispatchMode``). Its saved-tensor hooks keep nothing but metadata, and
hand out fresh memory when the backward asks, so storages live exactly as long as Python and the autograd engine hold
them. These lifetimes are the ones that a plan can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from autoremat.engines.torch.operators.collectives import run_alone
from autoremat.engines.torch.operators.facts import OpFacts, facts_of, tensors_in
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import PackedLocal, description_of, is_apart, is_taken_apart, local_of
from autoremat.engines.torch.operators.numbers import has_number
from autoremat.engines.torch.operators.signature import signature_of
from autoremat.engines.torch.operators.values import ValueMap, View, is_parameter, storage_of
from autoremat.engines.torch.recording.dense import covers_storage, is_dense, is_whole
from autoremat.engines.torch.recording.frames import in_python_function, user_line
from autoremat.engines.torch.recording.log import Log
from autoremat.engines.torch.recording.packs import Packed, Packs
from autoremat.engines.torch.recording.recording import RecordedOp, RecordedValue, Recording
from autoremat.engines.torch.recording.storages import Storages

ASKS_FOR_DEVICE = torch.ops.prim.device.default
"""The operator with which autograd and kernels ask for the device."""


@dataclass
class Recorder(TorchDispatchMode):
    """Records running ops; ``pack`` and ``unpack`` are its saved-tensor hooks.

    Args:
        blank: makes memory for an unpacked tensor: ``blank(size, stride, dtype, device)``.
        convert: turns a tensor met on the way into one of the recording's world (a fake one); identity on real ones.
        module_path: the path of the module that runs now.
    """

    blank: Callable[[Sequence[int], Sequence[int], torch.dtype, torch.device], Tensor]
    convert: Callable[[Tensor], Tensor]
    module_path: Callable[[], str]

    def __post_init__(self) -> None:
        super().__init__()
        _buffered_use_counts()
        self.log = Log()
        self.storages = Storages(self.log)
        self.packs = Packs(self.log, self.storages)
        self.backward = False
        self.call = -1
        """The number of the running call, where calls are recorded."""
        self._paused = False
        self._backward_module = self._backward_source = ""

    @property
    def map(self) -> ValueMap:
        """Return what numbers the values."""
        return self.log.map

    @property
    def ops(self) -> list[RecordedOp]:
        """Return the ops seen so far."""
        return self.log.ops

    @property
    def values(self) -> dict[int, RecordedValue]:
        """Return the values seen so far, by number."""
        return self.log.values

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip the compiler's wrapper around ``__torch_dispatch__``: nothing here is compiled."""
        return False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record no operators in this block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def recording(self) -> Recording:
        """Return what has been seen, as plain data."""
        return self.log.recording()

    @contextmanager
    def seeded(self, outputs: list[Tensor]) -> Iterator[Callable[[], None]]:
        """Yield a function that starts the backward from these outputs."""
        with self.paused():
            begin = backward_from(outputs)
        yield begin

    # ---- operators -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator and record it."""
        kwargs = kwargs or {}
        if func is ASKS_FOR_DEVICE and type(args[0]) is FakeTensor:
            if not self._paused:
                self.log.know_outside(args)
            return args[0].device  # a shortcut: more than half of all calls are this one
        if types and is_taken_apart(types):
            return NotImplemented
        if self._paused:
            return func(*args, **kwargs)
        facts = facts_of(func)
        args, kwargs = _converted(args, self.convert), _converted(kwargs, self.convert)
        inputs = tensors_in((args, kwargs))
        if any(t.is_inference() for t in inputs) and (out := _apart(self, func, args, kwargs)) is not NotImplemented:
            return out
        if facts.is_view:
            out = func(*args, **kwargs)
            _know_empty_views(self.log.map, inputs, tensors_in(out))
            return out
        reads = self.log.map.reads(inputs)
        self.log.know_outside(inputs)
        joins = _is_accumulation(self, func, args)
        signature = None if facts.communicates else signature_of(func, args, kwargs)
        builds_graph = not self.backward and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        if signature is not None and builds_graph and has_number(signature):
            self.log.calls_with_numbers.append(signature)
        out = self._run(func, facts, args, kwargs)
        outputs = tensors_in(out)
        seen = self.log.map.seen(facts, args, kwargs, reads, outputs)
        if facts.fresh_constant:
            self.log.know_outside(outputs)
        if not seen.is_op:
            return out
        in_place = seen.in_place
        if not self.backward:
            self.packs.move(in_place)
        if joins and len(seen.writes) == 1:
            in_place = ((seen.writes[0][0], reads[0][0]),)
        op = RecordedOp(
            facts.name,
            list(seen.reads),
            tuple(n for n, _ in seen.writes),
            in_place,
            self.backward,
            facts,
            seen.effects,
            seen.opaque,
            facts.overwriting and covers_storage(args[0]),
            signature,
            self._backward_module if self.backward else self.module_path(),
            self._backward_source if self.backward else user_line(),
            -1 if self.backward else self.call,
        )
        self.log.overwrite(seen.effects)
        self.log.append(op)
        for number, tensor in seen.writes:
            self.storages.born(number, tensor, op)
        return out

    def _run(self, func: torch._ops.OpOverload, facts: OpFacts, args: Any, kwargs: dict[str, Any]) -> Any:
        if not facts.communicates:
            return _told_apart(func(*args, **kwargs))
        with self.paused():
            return run_alone(func, args, kwargs)

    # ---- saved tensors -------------------------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Any:
        """Keep metadata of a saved tensor; of one from outside, an alias."""
        if is_apart(tensor):
            return PackedLocal(self.pack(local_of(tensor)), description_of(tensor))
        with self.paused():
            tensor = self.convert(tensor)
            storage = storage_of(tensor)
            if storage is None:
                return tensor.detach()
            number = self.log.map.number(storage)
            if number < 0 or is_parameter(tensor):
                self.log.know_outside([tensor])
                return tensor if is_leaf(tensor) else tensor.detach()
        return self.packs.save(number, View.of(tensor), tensor.device, self.module_path(), user_line())

    def unpack(self, packed: Any) -> Tensor:
        """Hand out fresh memory for a saved tensor."""
        if isinstance(packed, PackedLocal):
            local = self.unpack(packed.packed)
            with self.paused():
                return packed.description.around(local)
        if not isinstance(packed, Packed):
            return packed
        if self.backward:
            self._backward_module, self._backward_source = packed.module, packed.source
        with self.paused():
            view = packed.view
            tensor = base = self._blank_for(view, self.log.values[packed.number].nbytes, packed.device)
            if base.size() != view.size or base.stride() != view.stride:
                tensor = base.as_strided(view.size, view.stride, view.offset)
            tensor = torch._conj(tensor) if view.conjugated else tensor
            tensor = torch._neg_view(tensor) if view.negated else tensor
        self.packs.ask(packed)
        self.storages.hold(base.untyped_storage(), packed.number)
        return tensor

    def _blank_for(self, view: View, nbytes: int, device: torch.device) -> Tensor:
        """Make memory for a value; the tensor itself if it views everything."""
        if not view.offset and view.size.numel() * view.dtype.itemsize == nbytes and is_whole(view.size, view.stride):
            return self.blank(view.size, view.stride, view.dtype, device)
        return self.blank((-(-nbytes // view.dtype.itemsize),), (1,), view.dtype, device)

    def finish(self) -> None:
        """Hold whatever still lives to the end of the step."""
        self.storages.finish()
        self.packs.finish()


def _converted(tree: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return convert(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_converted(v, convert) for v in tree)
    if isinstance(tree, dict):
        return {k: _converted(v, convert) for k, v in tree.items()}
    return tree


def _know_empty_views(map: ValueMap, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Treat an empty view as a view, even on its own storage."""
    for viewed, tensor in product(inputs[:1], outputs):
        own, base = storage_of(tensor), storage_of(viewed)
        if own is not None and base is not None and own._cdata != base._cdata and not tensor.numel():
            map.rebind(own, map.number(base))


def backward_from(outputs: list[Tensor]) -> Callable[[], None]:
    """Return what starts the backward from these outputs, as a loss would.

    A single number is a loss. Anything else is joined in a node whose backward makes the gradients; nothing holds those
    longer than it needs them.
    """
    if len(outputs) == 1 and outputs[0].numel() == 1:
        return outputs[0].backward
    seed = _Seed.apply(*outputs)
    start = seed.detach()
    return lambda: seed.backward(start)


class _Seed(torch.autograd.Function):
    """Joins outputs into a scalar; its backward makes their gradients.

    Each output gets a gradient of its size.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.outputs = [(t.shape, t.dtype, t.device) for t in outputs]
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.outputs)


def _is_sole_owner(tensor: Tensor) -> bool:
    """Tell whether only the engine's buffer refers to tensor and storage."""
    return _use_counts(tensor) == _buffered_use_counts()


def _use_counts(tensor: Tensor) -> tuple[int, int]:
    """Count the references to the tensor and to its storage.

    Those of the caller are included.
    """
    storage = tensor.untyped_storage()
    counted: Any = tensor
    return counted._use_count(), torch._C._storage_Use_Count(storage._cdata)


@lru_cache(maxsize=1)
def _buffered_use_counts() -> tuple[int, int]:
    """Measure ``_use_counts`` of a gradient that only the engine refers to.

    The number depends on how torch passes arguments to a dispatch mode, so it is read off a graph where the answer is
    known.
    """
    counts: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor:
                counts.append(_use_counts(args[0]))
            return func(*args, **(kwargs or {}))

    with _disable_current_modes(), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True).clone()
        y = x.exp() + x.sin()
        with Look():
            torch.autograd.grad(y, x, torch.zeros(1))
    return counts[0]


def _told_apart(out: Any) -> Any:
    """Clone a result that a fake kernel returns twice.

    The real kernel makes two tensors. Fake kernels, and the cache of ``FakeTensorMode``
    (``_subclasses/fake_tensor.py``, torch 2.13), may return one twice.
    """
    if type(out) is not tuple:
        return out
    return tuple(
        t.clone() if isinstance(t, FakeTensor) and any(t is s for s in out[:i]) else t for i, t in enumerate(out)
    )


def _apart(mode: TorchDispatchMode, func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a composite operator, as its parts, under the mode.

    In inference mode autograd does not do so. NotImplemented for all other operators.
    """
    with mode:
        return func.decompose(*args, **kwargs)


def _is_accumulation(recorder: Recorder, func: torch._ops.OpOverload, args: Any) -> bool:
    """Tell whether this add is the engine accumulating gradients in place.

    The engine adds in place if nothing else refers to the first gradient, but never under a dispatch mode, nor with
    tensor subclasses (``can_accumulate_inplace`` in ``torch/csrc/autograd/input_buffer.cpp``, torch 2.13). A node
    that has let go of its saved tensors is done: from then on only the engine adds.
    """
    if (
        not recorder.backward
        or func is not torch.ops.aten.add.Tensor
        or recorder.packs.are_open()
        or torch.is_grad_enabled()
    ):
        return False
    old, new = args[0], args[1]
    if not isinstance(new, Tensor) or old.shape != new.shape or in_python_function():
        return False
    return is_dense(old) and _is_sole_owner(old)
