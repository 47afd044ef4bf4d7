"""Keeping: what may not be rerun, and what may not be dropped.

Such values are overwritten, escape, or are held by others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.check import CHANGED
from autoremat.engines.torch.eager.ledger import Ledger, copy_of
from autoremat.engines.torch.eager.passes import Passes
from autoremat.engines.torch.eager.witness import Witness
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import is_parameter, storage_of
from autoremat.program.once import Once, Reason

READS_OVERWRITTEN: Final = Reason(Once.READS_CHANGING)
_OURS: Final = 2
"""References to a storage that only the ledger holds.

One is the ledger's tensor, the other the object that asks.
"""


class Keeping:
    """Makes sure that the calls of a noted step can be rerun.

    Args:
        ledger: of the step.
        passes: who waits for which value.
        witness: is told what must not be rerun.
        storages: of parameters, buffers, gradients and inputs, by address.
    """

    def __init__(
        self, ledger: Ledger, passes: Passes, witness: Witness, storages: Collection[torch.UntypedStorage] = ()
    ) -> None:
        self._ledger, self._passes, self._witness = ledger, passes, witness
        self._lasting = frozenset(s._cdata for s in storages)
        self._overwritten_outside: set[int] = set()
        self._readers: dict[int, set[int]] = {}
        """By value, the calls that read it when they are rerun."""
        self._outside_readers: dict[int, set[int]] = {}
        """The same for memory from outside, by address of its storage."""
        self._spans = _shared(storages)
        """Address ranges of outside memory that may be shared unknown to torch.

        By the address of the storage.
        """
        self.escaped: set[int] = set()
        self.uninitialised: set[int] = set()
        """Values of uninitialised memory: a rerun would make something else."""
        self.before_outside: Callable[[Tensor], None] = lambda tensor: None
        """Called with what the step did not make and will overwrite."""

    # ---- what may be read by a call that is made again -----------------------------------------------------------

    def is_outside(self, tensor: Tensor) -> bool:
        """Tell whether a rerun may use an outside tensor as it is.

        It may if the tensor outlives the step.
        """
        if is_parameter(tensor) or is_leaf(tensor):
            return True
        storage = storage_of(local_of(tensor))
        return storage is not None and storage._cdata in self._lasting

    def is_readable(self, number: int, tensor: Tensor) -> bool:
        """Tell whether a rerun would find this argument as it is now."""
        if number in self.escaped or number in self._overwritten_outside:
            return False
        return number >= 0 or self.is_outside(tensor)

    def enter(self, call: int) -> None:
        """Note that a call can be rerun from now on."""
        entry = self._ledger.entries[call]
        for value in entry.reads:
            self._readers.setdefault(value, set()).add(call)
        for outside in entry.outside:
            storage = storage_of(local_of(outside.tensor))
            if storage is not None:
                self._outside_readers.setdefault(storage._cdata, set()).add(call)
                known = storage._cdata in self._lasting or storage._cdata in self._spans
                is_resized = is_parameter(outside.tensor) and storage.resizable()  # fully_shard resizes parameters
                if not known and not is_resized and storage.device.type == "cpu":
                    self._spans[storage._cdata] = _span(storage)

    def is_read(self, value: int) -> bool:
        """Tell whether the rerun of some call would read this value."""
        return bool(self._readers.get(value))

    # ---- overwriting ---------------------------------------------------------------------------------------------

    def before_writing(self, number: int, tensor: Tensor, *, statistics: bool = False) -> None:
        """Save what reruns would read and the next call overwrites.

        The next forward overwrites memory from outside again, perhaps before this step's backward. So no call that has
        read it can be rerun.
        """
        storage = storage_of(local_of(tensor))
        if storage is None:
            return
        if number < 0:
            self.before_outside(tensor)
            if not statistics:
                self.overwrites_outside(number)
            self.freeze(self._outside_readers.get(storage._cdata, ()))
        elif number in self._ledger.held and number not in self._ledger.maker and self.is_read(number):
            self._ledger.hold(number, copy_of(self._ledger.held[number]))
        if self._spans and storage.device.type == "cpu":
            begin, end = _span(storage)
            for address, (other_begin, other_end) in self._spans.items():
                if address != storage._cdata and other_begin < end and begin < other_end:
                    self.freeze(self._outside_readers.get(address, ()))

    def overwrites_outside(self, number: int | None) -> None:
        """Note that the step has overwritten memory from outside."""
        if number is not None:
            self._overwritten_outside.add(number)

    def overwritten(self, old: int, new: int, tensor: Tensor) -> None:
        """Note that the memory of a value holds another one now."""
        held = self._ledger.held.get(old)
        local = local_of(tensor)
        if held is not None and held.untyped_storage()._cdata == local.untyped_storage()._cdata:
            self._ledger.let_go(old)
        if self._passes.move(old, new) and new not in self._ledger.held:
            self._ledger.hold(new, local.detach())

    # ---- escaping ------------------------------------------------------------------------------------------------

    def escape(self, values: Sequence[int]) -> None:
        """Keep values as they are once code outside torch knows their memory."""
        self.escaped.update(values)
        makers = {self._ledger.maker[v] for v in values if v in self._ledger.maker}
        self.freeze(makers.union(*(self._readers.get(v, ()) for v in values)))
        self._witness.changed_unseen(values)

    def freeze(self, calls: Iterable[int], why: Reason = READS_OVERWRITTEN) -> None:
        """Forbid reruns of calls; keep what they made, recomputing it if gone."""
        frozen = self._beyond(calls)
        for k in sorted(frozen):
            for value in self._ledger.entries[k].makes:
                if value not in self._ledger.held and self.is_waited_for(value):
                    self._ledger.fetch(value, lambda v: False, lambda locked: None)
                    self._ledger.recomputed.discard(value)
        for k in sorted(frozen):
            self._withdraw(k, why)

    def _beyond(self, calls: Iterable[int]) -> set[int]:
        """Add the calls that read what only the given ones could make.

        It goes on as long as nobody waits for anything that those make.
        """
        found = set[int]()
        pending = list(calls)
        while pending:
            k = pending.pop()
            if k in found or k not in self._ledger.entries:
                continue
            found.add(k)
            for value in self._ledger.entries[k].makes:
                if value not in self._ledger.held and not self.is_waited_for(value):
                    pending += self._readers.get(value, ())
        return found

    def is_waited_for(self, value: int) -> bool:
        """Tell whether somebody waits for a dropped value or its dropped results."""
        seen, pending = {value}, [value]
        while pending:
            v = pending.pop()
            if v in self._passes.needs.handles:
                return True
            for k in self._readers.get(v, ()):
                made = {m for m in self._ledger.entries[k].makes if m not in self._ledger.held} - seen
                seen |= made
                pending += made
        return False

    def _withdraw(self, call: int, why: Reason) -> None:
        entry = self._ledger.withdraw(call)
        for value in entry.reads:
            if value in self._readers:
                self._readers[value].discard(call)
        for outside in entry.outside:
            storage = storage_of(local_of(outside.tensor))
            if storage is not None and storage._cdata in self._outside_readers:
                self._outside_readers[storage._cdata].discard(call)
        self._witness.once(call, why)

    def has_changed(self, value: int, tensor: Tensor) -> None:
        """Keep a value as it is after a change behind torch's back.

        What was made from its former content is recomputed now if it is gone: later that would be impossible.
        """
        readers = list(self._readers.get(value, ()))
        if value in self._ledger.maker:
            self._ledger.let_go(value)  # the ledger's memory holds something else by now
            self.freeze(readers, CHANGED)
            maker = self._ledger.maker.get(value)
            if maker is not None:
                self.freeze([maker], CHANGED)
        else:
            for call in readers:
                self._withdraw(call, CHANGED)
        self._ledger.hold(value, local_of(tensor).detach())

    # ---- letting go ----------------------------------------------------------------------------------------------

    def may_go(self, value: int) -> bool:
        """Tell whether dropping a held value frees memory and loses nothing.

        As long as somebody else holds the memory, nothing would be freed, and it could be written behind torch's back.
        """
        if value not in self._ledger.maker or value in self.uninitialised:
            return False
        held = self._ledger.held[value]
        return bool(torch._C._storage_Use_Count(held.untyped_storage()._cdata) <= _OURS)


def _span(storage: torch.UntypedStorage) -> tuple[int, int]:
    begin = storage.data_ptr()
    return begin, begin + storage.nbytes()


def _shared(storages: Collection[torch.UntypedStorage]) -> dict[int, tuple[int, int]]:
    """Find the storages that lie on memory of another one, by address."""
    spans = sorted((*_span(s), s._cdata) for s in storages if s.device.type == "cpu" and s.nbytes())
    found: dict[int, tuple[int, int]] = {}
    widest = (0, 0, 0)
    for begin, end, address in spans:
        if begin < widest[1]:
            found[address], found[widest[2]] = (begin, end), widest[:2]
        widest = max(widest, (begin, end, address), key=lambda span: span[1])
    return found
