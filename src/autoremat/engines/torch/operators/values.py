"""Tells which value a tensor views: storages, versions, numbers.

The recorder and the tape number values by the same rules, so that a run can follow a plan made from a recording: values
made by operators count 0, 1, 2, ... in the order they are written; values from outside (parameters, inputs, constants)
count -1, -2, ... in the order they are first met.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autoremat.engines.torch.operators.facts import OpFacts
from autoremat.engines.torch.operators.local import PLAIN

_new_tuple: Any = tuple.__new__
"""Builds a named tuple in a third of the usual time."""
_ROW = 512
"""Row length, in 8-byte numbers, for checksums of large memory."""
_MANY = 1 << 16
"""From this many bytes on, row and column sums are checksummed."""


class View(NamedTuple):
    """How a tensor looks at a storage."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    conjugated: bool
    negated: bool

    @staticmethod
    def of(tensor: Tensor) -> View:
        """Return the view that this tensor is."""
        seen = tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _new_tuple(View, (*seen, tensor.is_conj(), tensor.is_neg()))

    def is_of(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is this view of its storage."""
        return (
            tensor.size() == self.size and tensor.stride() == self.stride and tensor.dtype is self.dtype
            and tensor.storage_offset() == self.offset
            and tensor.is_conj() is self.conjugated and tensor.is_neg() is self.negated
        )  # fmt: skip

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """Make a tensor that views the storage in this way.

        It has no gradient, and a version counter of its own.
        """
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.conjugated:
            tensor = torch._conj(tensor)
        return torch._neg_view(tensor) if self.negated else tensor


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the storage of an ordinary tensor.

    None for sparse, quantized, nested and wrapped tensors, which stay opaque.
    """
    if type(tensor) not in PLAIN and (torch.nn.parameter.is_lazy(tensor) or _wraps(tensor)):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor._is_zerotensor():
        return None
    return tensor.untyped_storage()


def is_parameter(tensor: Tensor) -> bool:
    """Tell whether a tensor is a leaf parameter.

    That includes one whose data an operator has made (``parameter.data = ...``). Autograd saves such a leaf itself, so
    its backward sees the data that the parameter has by then.
    """
    kind = type(tensor)
    return kind is not Tensor and isinstance(tensor, torch.nn.Parameter) and tensor.is_leaf


def _wraps(tensor: Tensor) -> bool:
    """Tell whether the tensor's class handles operators itself, fake tensors excepted."""
    fake = torch._subclasses.FakeTensor
    return not isinstance(tensor, fake) and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def fingerprint(storage: torch.UntypedStorage, part: slice = slice(None)) -> int:
    """Return a checksum, below 2**64, of some bytes of memory."""
    if storage.device.type == "meta":
        return 0  # there are no contents
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[part]
    if storage.device.type == "cpu":
        return _checksum(whole.data_ptr(), whole.numel())
    wide = whole[: len(whole) // 8 * 8].clone().view(torch.int64)
    return (int(wide.sum()) ^ int(whole[wide.numel() * 8 :].sum())) % (1 << 64)


def _checksum(address: int, n: int) -> int:
    """Compute the checksum of ``n`` bytes at an address.

    For large memory it is the checksum of the sums of rows and columns, which takes a fifth of the time. The bytes are
    read by address, because ``Tensor.numpy()`` makes the storage non-resizable for its owner
    (``torch/csrc/utils/tensor_numpy.cpp``, torch 2.13).
    """
    rest = n % (8 * _ROW) if n >= _MANY and address % 8 == 0 else n
    found = zlib.crc32((ctypes.c_ubyte * rest).from_address(address + n - rest)) if rest else 0
    if rest < n:
        rows = np.ctypeslib.as_array((ctypes.c_int64 * ((n - rest) // 8)).from_address(address)).reshape(-1, _ROW)
        found = zlib.crc32(rows.sum(1).tobytes(), zlib.crc32(rows.sum(0).tobytes(), found))
    return found


class Seen(NamedTuple):
    """What one operator call did to values.

    Attributes:
        reads: numbers of the values it read, each once, in the order of the arguments.
        writes: number and one tensor of every value it made.
        in_place: pairs (made, overwritten) of values of the same storage.
        effects: numbers of the values from outside that it overwrote.
        opaque: whether a tensor took part whose storage we cannot see.
    """

    reads: tuple[int, ...]
    writes: tuple[tuple[int, Tensor], ...]
    in_place: tuple[tuple[int, int], ...]
    effects: tuple[int, ...]
    opaque: bool

    @property
    def is_op(self) -> bool:
        """Whether the call was an op of the program, not a view."""
        return bool(self.writes or self.effects)


class ValueMap:
    """The numbers of all storages met so far.

    A storage is known by its address. A weak reference, which keeps no data, keeps the address from being reused.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._weak_references: list[Any] = []
        self.made = 0
        self.outside = 0

    def number(self, storage: torch.UntypedStorage) -> int:
        """Return the value in the storage; unknown storage is from outside."""
        known = self._known.get(storage._cdata)
        return known if known is not None else self.bind_outside(storage)

    def bind_made(self, storage: torch.UntypedStorage) -> int:
        """Number a new value that an operator has written into this storage."""
        number = self.made
        self.made += 1
        self._bind(storage, number)
        return number

    def bind_outside(self, storage: torch.UntypedStorage) -> int:
        """Number a new value from outside that this storage holds."""
        self.outside += 1
        self._bind(storage, -self.outside)
        return -self.outside

    def _bind(self, storage: torch.UntypedStorage, number: int) -> None:
        address = storage._cdata
        if address not in self._known:
            self._weak_references.append(storage._weak_ref())
        self._known[address] = number

    def __del__(self) -> None:
        for reference in self._weak_references:
            torch.UntypedStorage._free_weak_ref(reference)

    def living(self) -> Iterator[torch.UntypedStorage]:
        """Yield the known storages that something still refers to."""
        for reference in list(self._weak_references):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference)
            if storage is not None:
                yield storage

    def rebind(self, storage: torch.UntypedStorage, number: int) -> None:
        """Let this storage hold a value that already has a number."""
        self._bind(storage, number)

    def reads(self, tensors: Iterable[Tensor]) -> tuple[tuple[int, ...], bool]:
        """Number the values these tensors view; tell whether any is opaque."""
        numbers: dict[int, None] = {}
        opaque = False
        known = self._known
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is None:
                opaque = True
                continue
            found = known.get(storage._cdata)
            numbers[found if found is not None else self.bind_outside(storage)] = None
        return tuple(numbers), opaque

    def seen(
        self,
        facts: OpFacts,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        reads: tuple[tuple[int, ...], bool],
        outputs: Sequence[Tensor],
    ) -> Seen:
        """Number what a call has just made and overwritten."""
        numbers, opaque = reads
        writes: list[tuple[int, Tensor]] = []
        in_place: list[tuple[int, int]] = []
        effects: list[int] = []
        done: set[int] = set()
        for tensor in facts.written(args, kwargs):
            storage = storage_of(tensor)
            if storage is None:
                opaque = True
            elif storage._cdata not in done:
                done.add(storage._cdata)
                old = self.number(storage)
                if old < 0:
                    effects.append(old)
                else:
                    new = self.bind_made(storage)
                    writes.append((new, tensor))
                    in_place.append((new, old))
        for tensor in outputs:
            storage = storage_of(tensor)
            if storage is None:
                opaque = True
            elif storage._cdata not in done:
                done.add(storage._cdata)
                if storage._cdata in self._known:
                    continue  # a view of what was there before, whatever the schema says
                if facts.fresh_constant:
                    self.bind_outside(storage)
                else:
                    writes.append((self.bind_made(storage), tensor))
        return Seen(numbers, tuple(writes), tuple(in_place), tuple(effects), opaque)
