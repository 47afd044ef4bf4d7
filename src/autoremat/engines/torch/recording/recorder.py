"""The recorder: sees every operator of a step, and every storage's death.

It works below autograd and autocast (a ``TorchDispatchMode``). Its saved-tensor hooks keep nothing but metadata, and
hand out fresh memory when the backward asks, so storages live exactly as long as Python and the autograd engine hold
them. These lifetimes are the ones that a plan can reach.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
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
from autoremat.engines.torch.operators.signature import CallSignature, signature_of
from autoremat.engines.torch.operators.values import ValueMap, View, is_parameter, storage_of
from autoremat.engines.torch.recording.recording import RecordedOp, RecordedValue, Recording
from autoremat.engines.torch.world.gradients import ACCUMULATE, label_of

_OURS = Path(__file__).parents[3]
_LIBRARY = (
    str(Path(torch.__file__).parent),
    *(str(_OURS / n) for n in ("engines", "api.py", "largest.py")),
)
_TYPED_IN = ("<stdin>", "<ipython-input")
ASKS_FOR_DEVICE = torch.ops.prim.device.default
"""The operator with which autograd and kernels ask for the device."""


@dataclass(slots=True)
class _Storage:
    """A living storage and the value that it holds now.

    For memory handed out on unpack it also has the op since when.
    """

    number: int
    ref: weakref.ref[Any] | None = None
    unpacked_at: int | None = None


class _Packed:
    """The metadata that the recorder keeps of a saved tensor; no data."""

    __slots__ = ("__weakref__", "device", "module", "n", "number", "source", "unpacked", "view")

    def __init__(self, n: int, number: int, view: View, device: torch.device, module: str, source: str) -> None:
        self.number, self.view, self.device, self.module, self.source = number, view, device, module, source
        self.n = n
        self.unpacked = False


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
    map: ValueMap = field(default_factory=ValueMap)
    ops: list[RecordedOp] = field(default_factory=list)
    values: dict[int, RecordedValue] = field(default_factory=dict)
    on_op: Callable[[int], None] = lambda n: None

    def __post_init__(self) -> None:
        super().__init__()
        _buffered_use_counts()
        self.backward = False
        self.call = -1
        """The number of the running call, where calls are recorded."""
        self._paused = False
        self._n_packed = 0
        self._storages: dict[int, _Storage] = {}
        self._packed: dict[int, weakref.ref[_Packed]] = {}
        self._packed_as: dict[int, int] = {}
        self._packs_of: dict[int, set[int]] = {}
        self._open: dict[int, int] = {}
        self._outside_version: dict[int, int] = {}
        self.changed_unseen: set[int] = set()
        self.calls_with_numbers: list[CallSignature] = []
        self._backward_module = self._backward_source = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Skip the compiler's wrapper around ``__torch_dispatch__``: nothing here is compiled."""
        return False

    # ---- values from outside -------------------------------------------------------------------------------------

    def know(self, tensor: Tensor, label: str, kind: str, module: str = "") -> None:
        """Register a tensor that exists before the step."""
        tensor = local_of(tensor)
        storage = storage_of(tensor)
        if storage is not None:
            number = self.map.number(storage)
            self.values.setdefault(number, RecordedValue.of(tensor, label, kind, module))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record no operators in this block."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def accumulates(self, gradient: Tensor) -> None:
        """Note that the backward hands a leaf its gradient now."""
        storage = storage_of(local_of(gradient))
        number = None if storage is None else self.map.number(storage)
        if number in self.values:
            self._append(RecordedOp(ACCUMULATE, [number], (), (), True, None))

    def call_gradient(self, tensor: Tensor, name: str, module: str) -> None:
        """Mark a tensor as a leaf's gradient; parameters give a name."""
        storage = storage_of(local_of(tensor))
        if storage is None:
            return
        value = self.values.get(self.map.number(storage))
        if value is None:  # the gradient existed before, or was made unseen
            return
        value.kind = "gradient"
        if name:
            value.label, value.module = label_of(name, value.text), module

    def leave_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Note that these gradients leave their memory once complete."""
        for storage in filter(None, map(storage_of, gradients)):
            value = self.values.get(self.map.number(storage))
            if value is not None:
                value.forever, value.died = False, None

    def recording(self) -> Recording:
        """Return what has been seen, as plain data."""
        return Recording(
            self.ops,
            self.values,
            self.map.made,
            self.changed_unseen,
            {n for n, version in self._outside_version.items() if version},
            self.calls_with_numbers,
        )

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
                self._know_outside(args)
            return args[0].device  # a shortcut: more than half of all calls are this one
        if types and is_taken_apart(types):
            return NotImplemented
        if self._paused:
            return func(*args, **kwargs)
        facts = facts_of(func)
        args, kwargs = self._converted(args), self._converted(kwargs)
        if facts.is_view:
            out = func(*args, **kwargs)
            self._know_empty_views(tensors_in((args, kwargs)), tensors_in(out))
            return out
        inputs = tensors_in((args, kwargs))
        reads = self.map.reads(inputs)
        self._know_outside(inputs)
        joins = self._is_accumulation(func, args)
        signature = None if facts.communicates else signature_of(func, args, kwargs)
        builds_graph = not self.backward and torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        if signature is not None and builds_graph and has_number(signature):
            self.calls_with_numbers.append(signature)
        out = self._run(func, facts, args, kwargs)
        outputs = tensors_in(out)
        seen = self.map.seen(facts, args, kwargs, reads, outputs)
        if facts.fresh_constant:
            self._know_outside(outputs)
        if not seen.is_op:
            return out
        in_place = seen.in_place
        self._move_packed(in_place)
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
            facts.overwriting and _covers_storage(args[0]),
            signature,
            self._backward_module if self.backward else self.module_path(),
            self._backward_source if self.backward else _user_line(),
            -1 if self.backward else self.call,
        )
        for n in seen.effects:
            self._outside_version[n] = self._outside_version.get(n, 0) + 1
        self._append(op)
        for number, tensor in seen.writes:
            self._born(number, tensor, op)
        return out

    def _run(self, func: torch._ops.OpOverload, facts: OpFacts, args: Any, kwargs: dict[str, Any]) -> Any:
        if not facts.communicates:
            return _told_apart(func(*args, **kwargs))
        with self.paused():
            return run_alone(func, args, kwargs)

    def _converted(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self.convert(tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)(self._converted(v) for v in tree)
        if isinstance(tree, dict):
            return {k: self._converted(v) for k, v in tree.items()}
        return tree

    def _append(self, op: RecordedOp) -> None:
        self.ops.append(op)
        self.on_op(len(self.ops))

    def _know_empty_views(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Treat an empty view as a view, even on its own storage."""
        for viewed, tensor in product(inputs[:1], outputs):
            own, base = storage_of(tensor), storage_of(viewed)
            if own is not None and base is not None and own._cdata != base._cdata and not tensor.numel():
                self.map.rebind(own, self.map.number(base))

    def _know_outside(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None:
                number = self.map.number(storage)
                if number < 0 and number not in self.values:
                    self.values[number] = RecordedValue.of(tensor, "constant", "input")

    def _is_accumulation(self, func: torch._ops.OpOverload, args: Any) -> bool:
        """Tell whether this add is the engine accumulating gradients in place.

        The engine adds in place if nothing else refers to the first gradient, but never under a dispatch mode, nor with
        tensor subclasses (``can_accumulate_inplace`` in ``torch/csrc/autograd/input_buffer.cpp``, torch 2.13). A node
        that has let go of its saved tensors is done: from then on only the engine adds.
        """
        if not self.backward or func is not torch.ops.aten.add.Tensor or self._open or torch.is_grad_enabled():
            return False
        old, new = args[0], args[1]
        if not isinstance(new, Tensor) or old.shape != new.shape or _in_python_function():
            return False
        return is_dense(old) and _is_sole_owner(old)

    # ---- lifetimes -----------------------------------------------------------------------------------------------

    def _born(self, number: int, tensor: Tensor, op: RecordedOp) -> None:
        storage = tensor.untyped_storage()
        kind = "temporary" if self.backward else "activation"
        value = RecordedValue.of(tensor, "", kind)
        value.label = f"{op.module or op.name} {value.text}"
        self.values[number] = value
        known = self._storages.get(storage._cdata)
        if known is not None:  # the op wrote in place, so the old value ends here
            self.values[known.number].died = len(self.ops)
            known.number = number
        else:
            self._watch(storage, _Storage(number))

    def _watch(self, storage: torch.UntypedStorage, entry: _Storage) -> None:
        address = storage._cdata
        self._storages[address] = entry
        entry.ref = weakref.ref(storage, lambda _: self._died(address))

    def revive(self, storage: torch.UntypedStorage, number: int) -> None:
        """Bring back a value that seemed gone: this is its memory."""
        self.map.rebind(storage, number)
        self.values[number].died = None
        self._watch(storage, _Storage(number))

    def _died(self, address: int) -> None:
        entry = self._storages.pop(address, None)
        if entry is None:
            return
        if entry.unpacked_at is None:
            self.values[entry.number].died = len(self.ops)
        else:
            self._is_used(entry.number, entry.unpacked_at)

    def _is_used(self, number: int, since: int) -> None:
        """Let ops since then read the value, which the backward held."""
        for op in self.ops[since + 1 :]:
            if number not in op.reads and number not in op.writes:
                op.reads.append(number)

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
            number = self.map.number(storage)
            if number < 0 or is_parameter(tensor):
                self._know_outside([tensor])
                return tensor if is_leaf(tensor) else tensor.detach()
            n, self._n_packed = self._n_packed, self._n_packed + 1
        packed = _Packed(n, number, View.of(tensor), tensor.device, self.module_path(), _user_line())
        key = id(packed)
        self._packed[key] = weakref.ref(packed, lambda _: self._released(key))
        self._packed_as[key] = number
        self._packs_of.setdefault(number, set()).add(key)
        return packed

    def _move_packed(self, in_place: Sequence[tuple[int, int]]) -> None:
        """Let what was saved stand for what its memory holds now.

        Overwriting a saved tensor is a user's error that shows in the backward; except where another part of the
        memory, with its own version counter, is overwritten (``unsafe_chunk``, ``tensor.data``).
        """
        if self.backward:
            return
        for new, old in in_place:
            for key in self._packs_of.pop(old, ()):
                packed = self._packed[key]()
                if packed is not None:
                    packed.number = new
                self._packed_as[key] = new
                self._packs_of.setdefault(new, set()).add(key)

    def _released(self, key: int) -> None:
        del self._packed[key]
        number = self._packed_as.pop(key)
        self._packs_of[number].discard(key)
        asked_at = self._open.pop(key, None)
        if asked_at is not None:  # its node is done, including sums over broadcast dimensions
            self._is_used(number, asked_at)
        else:  # nobody asked for it: plain training would have kept it until now
            value = self.values[number]
            value.died = max(value.died or 0, len(self.ops))

    def unpack(self, packed: Any) -> Tensor:
        """Hand out fresh memory for a saved tensor."""
        if isinstance(packed, PackedLocal):
            local = self.unpack(packed.packed)
            with self.paused():
                return packed.description.around(local)
        if not isinstance(packed, _Packed):
            return packed
        if self.backward:
            self._backward_module, self._backward_source = packed.module, packed.source
        with self.paused():
            view = packed.view
            tensor = base = self._blank_for(view, self.values[packed.number].nbytes, packed.device)
            if base.size() != view.size or base.stride() != view.stride:
                tensor = base.as_strided(view.size, view.stride, view.offset)
            tensor = torch._conj(tensor) if view.conjugated else tensor
            tensor = torch._neg_view(tensor) if view.negated else tensor
        packed.unpacked = True
        phase_op = RecordedOp("unpack", [packed.number], (), (), True, None, module=packed.module, source=packed.source,
                              packed=packed.n)  # fmt: skip
        self._append(phase_op)
        self._open[id(packed)] = len(self.ops) - 1
        self.hold(base.untyped_storage(), packed.number)
        return tensor

    def _blank_for(self, view: View, nbytes: int, device: torch.device) -> Tensor:
        """Make memory for a value; the tensor itself if it views everything."""
        if not view.offset and view.size.numel() * view.dtype.itemsize == nbytes and _is_whole(view.size, view.stride):
            return self.blank(view.size, view.stride, view.dtype, device)
        return self.blank((-(-nbytes // view.dtype.itemsize),), (1,), view.dtype, device)

    def hold(self, storage: torch.UntypedStorage, number: int) -> None:
        """Keep a value in memory while memory handed out for it lives."""
        self.map.rebind(storage, number)
        self._watch(storage, _Storage(number, unpacked_at=len(self.ops) - 1))

    def finish(self) -> None:
        """Hold whatever still lives to the end of the step."""
        for entry in self._storages.values():
            if entry.unpacked_at is None:
                self.values[entry.number].forever = True
        for ref in self._packed.values():
            packed = ref()
            if packed is not None and not packed.unpacked:
                self.values[packed.number].forever = True
        self._storages.clear()


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


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill their memory without gaps or overlaps.

    The dimensions may be in any order.
    """
    return _is_whole(tensor.shape, tensor.stride())


def _is_whole(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell the same of a tensor of this shape and strides."""
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda d: (d[1], d[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _covers_storage(tensor: Tensor) -> bool:
    return is_dense(tensor) and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()


def _user_line() -> str:
    """Return ``file:line`` of the innermost frame outside torch and autoremat."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        generated = filename.startswith("<") and not filename.startswith(_TYPED_IN)
        if not generated and not filename.startswith(_LIBRARY):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _in_python_function() -> bool:
    """Tell whether a custom ``autograd.Function`` runs its Python backward."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename.endswith("function.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


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
