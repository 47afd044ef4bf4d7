"""The living storages of a recording, and when they die."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.recording.log import Log
from autoremat.engines.torch.recording.recording import RecordedOp, RecordedValue


@dataclass(slots=True)
class _Storage:
    """A living storage and the value that it holds now.

    For memory handed out on unpack it also has the op since when.
    """

    number: int
    ref: weakref.ref[Any] | None = None
    unpacked_at: int | None = None


class Storages:
    """Watches memory: values live as long as the storage that holds them.

    Args:
        log: has the values.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._alive: dict[int, _Storage] = {}

    def living(self) -> set[int]:
        """Collect the numbers of values in memory that was not handed out."""
        return {entry.number for entry in self._alive.values() if entry.unpacked_at is None}

    def born(self, number: int, tensor: Tensor, op: RecordedOp) -> None:
        """Watch a value that an op has just made."""
        storage = tensor.untyped_storage()
        kind = "temporary" if op.backward else "activation"
        value = RecordedValue.of(tensor, "", kind)
        value.label = f"{op.module or op.name} {value.text}"
        self._log.values[number] = value
        known = self._alive.get(storage._cdata)
        if known is not None:  # the op wrote in place, so the old value ends here
            self._log.values[known.number].died = len(self._log.ops)
            known.number = number
        else:
            self._watch(storage, _Storage(number))

    def _watch(self, storage: torch.UntypedStorage, entry: _Storage) -> None:
        address = storage._cdata
        self._alive[address] = entry
        entry.ref = weakref.ref(storage, lambda _: self._died(address))

    def revive(self, storage: torch.UntypedStorage, number: int) -> None:
        """Bring back a value that seemed gone: this is its memory."""
        self._log.map.rebind(storage, number)
        self._log.values[number].died = None
        self._watch(storage, _Storage(number))

    def _died(self, address: int) -> None:
        entry = self._alive.pop(address, None)
        if entry is None:
            return
        if entry.unpacked_at is None:
            self._log.values[entry.number].died = len(self._log.ops)
        else:
            self.is_used(entry.number, entry.unpacked_at)

    def is_used(self, number: int, since: int) -> None:
        """Let ops since then read the value, which the backward held."""
        for op in self._log.ops[since + 1 :]:
            if number not in op.reads and number not in op.writes:
                op.reads.append(number)

    def hold(self, storage: torch.UntypedStorage, number: int) -> None:
        """Keep a value in memory while memory handed out for it lives."""
        self._log.map.rebind(storage, number)
        self._watch(storage, _Storage(number, unpacked_at=len(self._log.ops) - 1))

    def finish(self) -> None:
        """Hold whatever still lives to the end of the step."""
        for number in self.living():
            self._log.values[number].forever = True
        self._alive.clear()
