"""Which value a tensor is a view of: storages, their versions and their numbers.

The recorder and the tape number values by the same rules, so that a plan made from a recording can be followed by a
run: values made by operators count 0, 1, 2, ... in the order they are written, values from outside (parameters,
inputs, constants) count -1, -2, ... in the order they are first met.
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
"""Makes a named tuple in a third of the time."""
_ROW = 512
"""Numbers of eight bytes in a row of those whose sums stand for them ..."""
_MANY = 1 << 16
"""... where there are so many bytes."""


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
        """The view that this tensor is."""
        seen = tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _new_tuple(View, (*seen, tensor.is_conj(), tensor.is_neg()))

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """A tensor that looks at the storage in this way; no gradient, a version counter of its own."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.conjugated:
            tensor = torch._conj(tensor)
        return torch._neg_view(tensor) if self.negated else tensor


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of an ordinary tensor; None for sparse, quantized, nested and wrapped tensors, which stay opaque."""
    if type(tensor) not in PLAIN and (torch.nn.parameter.is_lazy(tensor) or _wraps(tensor)):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor._is_zerotensor():
        return None
    return tensor.untyped_storage()


def is_parameter(tensor: Tensor) -> bool:
    """Whether this is a parameter, even one whose data an operator has made (``parameter.data = ...``).

    Autograd saves such a leaf itself, so that its backward sees the data it has by then.
    """
    kind = type(tensor)
    return kind is not Tensor and isinstance(tensor, torch.nn.Parameter) and tensor.is_leaf


def _wraps(tensor: Tensor) -> bool:
    """Whether the tensor is of a class that handles operators itself (fake tensors, which we know, excepted)."""
    fake = torch._subclasses.FakeTensor
    return not isinstance(tensor, fake) and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def fingerprint(storage: torch.UntypedStorage, part: slice = slice(None)) -> int:
    """A number below 2**64 that tells the contents of some bytes of memory apart."""
    if storage.device.type == "meta":
        return 0  # there are no contents
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[part]
    if storage.device.type == "cpu":
        return _checksum(whole.data_ptr(), whole.numel())
    wide = whole[: len(whole) // 8 * 8].clone().view(torch.int64)
    return (int(wide.sum()) ^ int(whole[wide.numel() * 8 :].sum())) % (1 << 64)


def _checksum(address: int, n: int) -> int:
    """A checksum of so many bytes; of many, that of the sums of rows and columns, which takes a fifth of the time.

    By address: an array of NumPy on a tensor would make its storage one that the owner cannot resize any more.
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
        """Whether this was an op of the program, not merely another view."""
        return bool(self.writes or self.effects)


class ValueMap:
    """Numbers of the storages met so far.

    A storage is known by its address, kept from being used again by a weak reference (which keeps no data).
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}
        self._weak_references: list[Any] = []
        self.made = 0
        self.outside = 0

    def number(self, storage: torch.UntypedStorage) -> int:
        """The value that the storage holds now; a storage never met is a value from outside."""
        known = self._known.get(storage._cdata)
        return known if known is not None else self.bind_outside(storage)

    def bind_made(self, storage: torch.UntypedStorage) -> int:
        """A new value, made by an operator, that this storage holds from now on."""
        number = self.made
        self.made += 1
        self._bind(storage, number)
        return number

    def bind_outside(self, storage: torch.UntypedStorage) -> int:
        """A new value from outside that this storage holds."""
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
        """The storages met so far that something still refers to."""
        for reference in list(self._weak_references):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference)
            if storage is not None:
                yield storage

    def rebind(self, storage: torch.UntypedStorage, number: int) -> None:
        """Let this storage hold a value that has a number already."""
        self._bind(storage, number)

    def reads(self, tensors: Iterable[Tensor]) -> tuple[tuple[int, ...], bool]:
        """Numbers of the values these tensors look at, each once; and whether any tensor was opaque."""
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
        """Take note of a call that has just happened: number what it made and overwrote."""
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
