"""The ledger: what is in memory, and how to recompute the rest.

It decides nothing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import ModifiedInPlace, is_freed, modified, version_of
from autoremat.engines.torch.eager.away import NOWHERE, Nowhere
from autoremat.engines.torch.eager.entry import Entry
from autoremat.engines.torch.eager.state import Rerunning
from autoremat.engines.torch.operators.values import View

Along = Callable[[int], Iterable[int]]
"""Tells what else of a call that is rerun is to be held."""
NOTHING: Final[Along] = lambda call: ()  # noqa: E731


class Ledger:
    """Values by number, calls by position.

    Args:
        on_rerun: called with the seconds of every rerun.
        on_made: called with a call and the memory of what its rerun made.
    """

    def __init__(
        self,
        on_rerun: Callable[[float], None] = lambda seconds: None,
        on_made: Callable[[int, Entry, dict[int, Tensor]], None] | None = None,
    ) -> None:
        self.held: dict[int, Tensor] = {}
        self.entries: dict[int, Entry] = {}
        self.maker: dict[int, int] = {}
        """For every value that can be recomputed, the call that makes it."""
        self.recomputed: set[int] = set()
        """Values in memory that were recomputed after the forward dropped them."""
        self.reruns = 0
        self.meter: Meter | None = None
        """Counts the bytes, where somebody wants to know them."""
        self._versions: dict[int, int] = {}
        self.where: Sequence[str] = ()
        """For messages: what every call is, and where it stands."""
        self.away: Nowhere = NOWHERE
        """What is in a slower tier."""
        self._on_rerun, self._on_made = on_rerun, on_made

    def enter(self, call: int, entry: Entry) -> None:
        """Be ready to rerun a call."""
        self.entries[call] = entry
        for value in entry.makes:
            self.maker[value] = call

    def withdraw(self, call: int) -> Entry:
        """Forget that a call can be rerun."""
        entry = self.entries.pop(call)
        for value in entry.makes:
            if self.maker.get(value) == call:
                del self.maker[value]
        return entry

    def hold(self, value: int, tensor: Tensor) -> None:
        """Keep a value of the forward in memory."""
        if self.meter is not None:
            self.meter.add(tensor)
        self.held[value] = tensor

    def let_go(self, value: int) -> None:
        """Drop a value."""
        self.held.pop(value, None)
        self.recomputed.discard(value)
        self._versions.pop(value, None)

    def close(self) -> None:
        """Drop all values and calls: nothing will be asked for any more."""
        for value in list(self.held):
            self.let_go(value)
        self.entries.clear()
        self.maker.clear()
        self.away.close()

    def finish_forward(self) -> None:
        """Notice from now on when somebody overwrites a forward's value."""
        self._versions = {v: version_of(t) for v, t in self.held.items() if v not in self.recomputed}

    def memory(self, value: int) -> Tensor:
        """Return the memory of a held value.

        Raises:
            ModifiedInPlace: somebody has overwritten it since the forward.
        """
        tensor = self.held[value]
        version = self._versions.get(value)
        if version is not None and version_of(tensor) != version:
            raise modified(tensor, version)
        return tensor

    def missing(self, values: Collection[int]) -> dict[int, set[int]]:
        """List the calls to rerun for some values, and what for.

        The calls are in order, each with the values wanted of it.

        Raises:
            LookupError: one of the values on the way is lost.
        """
        wanted: dict[int, set[int]] = {}
        pending = list(values)
        while pending:
            v = pending.pop()
            if v in self.held or self.away.back(self, v):
                continue
            call = self.maker.get(v)
            if call is None:
                raise LookupError(v)
            if call not in wanted:
                wanted[call] = set()
                pending += self.entries[call].reads
            wanted[call].add(v)
        return {k: wanted[k] for k in sorted(wanted)}

    def can_make(self, calls: Iterable[int]) -> bool:
        """Tell whether everything these calls read from outside is there.

        ``fully_shard`` frees parameters for a while.
        """
        return not any(is_freed(outside.tensor) for k in calls for outside in self.entries[k].outside)

    def fetch(
        self, value: int, stays: Callable[[int], bool], after_each: Callable[[Container[int]], None],
        along: Along = NOTHING,
    ) -> Tensor:  # fmt: skip
        """Return the memory of a value, recomputed if it is gone.

        Args:
            value: which.
            stays: whether a value that was made on the way stays in memory.
            after_each: called after every call with the values that are still needed on the way.
            along: tells what else of a call that is rerun is to be held, of values that stay.
        """
        if value not in self.held:
            self.recompute((value,), stays, after_each, along=along)
        return self.memory(value)

    def recompute(
        self, values: Collection[int], stays: Callable[[int], bool], after_each: Callable[[Container[int]], None],
        may_run: Callable[[int, Container[int]], bool] = lambda call, needed: True,
        along: Along = NOTHING,
    ) -> None:  # fmt: skip
        """Recompute values that are gone, with one rerun per call: O(calls).

        Args:
            values: which.
            stays: whether another value that was made on the way stays in memory.
            after_each: as for ``fetch``.
            may_run: asked before every call, with the values that are still needed on the way; at the first one that
                may not run this ends, with what it has.
            along: as for ``fetch``.
        """
        try:
            missing = self.missing(values)
        except LookupError as lost:
            raise _lost(lost.args[0]) from None
        uses = Counter(v for k in missing for v in self.entries[k].reads)
        asked, made = set(values), set[int]()
        needed = _Needed(asked, uses)
        with Rerunning() as rerunning:
            for k, wanted in missing.items():
                if not may_run(k, needed):
                    break
                wanted.update([v for v in along(k) if v not in self.held])
                self.run(k, wanted, rerunning)
                made |= wanted
                reads = self.entries[k].reads
                uses.subtract(reads)
                for v in (*wanted, *(v for v in reads if v in made)):
                    if not uses[v] and v not in asked and not stays(v):
                        self.let_go(v)
                after_each(needed)
            else:
                return
        for v in made:
            if v not in asked and not stays(v):
                self.let_go(v)

    def run(self, call: int, wanted: Collection[int], rerunning: Rerunning, ends: Collection[int] = ()) -> None:
        """Rerun a call, and hold what is wanted of it.

        Args:
            call: which; what it reads is held.
            wanted: values that it makes.
            rerunning: the block in which this happens.
            ends: values that nobody needs afterwards, so that the call may overwrite them.
        """
        entry, begin = self.entries[call], perf_counter()
        memory = {v: self.memory(v) for v in entry.reads}
        for _, old in entry.in_place:
            if old in ends and old in self.recomputed:
                self.let_go(old)
            else:
                memory[old] = copy_of(memory[old])
        try:
            made = entry.run(memory, rerunning, wanted)
        except ModifiedInPlace as error:
            where = self.where[call] if call < len(self.where) else ""
            raise ModifiedInPlace(f"{error} {_needed_for(entry, where)}") from None
        if self._on_made is not None:
            self._on_made(call, entry, made)
        for value, tensor in made.items():
            if value not in self.held:
                self.hold(value, tensor)
                self.recomputed.add(value)
        self.reruns += 1
        self._on_rerun(perf_counter() - begin)


class _Needed:
    """The values that a recomputation still needs.

    They are those asked for, and those that its next calls read.
    """

    __slots__ = ("_asked", "_uses")

    def __init__(self, asked: Container[int], uses: Mapping[int, int]) -> None:
        self._asked, self._uses = asked, uses

    def __contains__(self, value: object) -> bool:
        return value in self._asked or self._uses.get(value, 0) > 0  # type: ignore[call-overload]


class Meter:
    """Counts the bytes of living storages that a step has made.

    Each storage counts once.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        self.nbytes = 0
        self._living: dict[int, _Living] = {}
        for tensor in held:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was made now, or was there before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._living:
            living = self._living[address] = _Living(storage, self._died)
            living.address, living.nbytes = address, storage.nbytes()
            self.nbytes += living.nbytes

    def _died(self, living: _Living) -> None:
        if self._living.pop(living.address, None) is not None:
            self.nbytes -= living.nbytes


class _Living(weakref.ref[torch.UntypedStorage]):
    """A storage that is counted, with what is known of it."""

    __slots__ = ("address", "nbytes")
    address: int
    nbytes: int


def copy_of(tensor: Tensor) -> Tensor:
    """Copy a tensor, with all of its memory."""
    with torch.no_grad():
        return View.of(tensor).on(tensor.untyped_storage().clone())


def _needed_for(entry: Entry, where: str) -> str:
    where = where or f"the call of {getattr(entry.func, '__name__', entry.func)}"
    name = where.split()[0] if "." in where else f"*{getattr(entry.func, '__name__', entry.func)}*"
    return (
        f"autoremat needs it as it was to run {where} again. Change it after the backward, hand over a clone of it, or "
        f'have what this operator makes kept (keep="{name}").'
    )


def _lost(value: int) -> RuntimeError:
    return RuntimeError(
        f"autoremat let go of value {value} and cannot make it again on this path of the backward; this is a bug in "
        "autoremat: run this step without it (autoremat.restore) and report it"
    )
