"""The self-check of a plan's first step: what runs again must give what it gave the first time.

Right after an op that the plan runs again, it runs a second time, where the budget has room for that, and both results
are compared. What differs is kept, in this step and from then on. Checksums of the results tell at every later look
whether something that torch does not see has changed them: then they are kept as they are now. In the backward, what
was computed again is compared with the checksum; by then nothing can be mended, so a difference is an error there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autoremat.record.facts import facts_of
from autoremat.record.values import ValueMap, fingerprint, storage_of
from autoremat.run.entry import Entry, Replay

DIFFERS = "gives something else when it runs again"
CHANGED = "what it makes is changed by something that torch does not see"

Memory = dict[int, torch.UntypedStorage]


class SelfCheck:
    """Checksums of what one forward made, and the comparisons.

    Args:
        twice: ops for whose second run, right after the first, there is room.
        on_difference: called with the op and the reason why it must not run again.
    """

    def __init__(
        self,
        twice: frozenset[int] = frozenset(),
        on_difference: Callable[[int, str], None] = lambda k, reason: None,
    ) -> None:
        self._twice, self._report = twice, on_difference
        self._sums: dict[int, int] = {}
        self._parts: dict[int, slice] = {}
        """Where in its memory a value is: some kernels leave bytes beside it that mean nothing."""
        self._maker: dict[int, int] = {}

    def leave_path(self, n_ops: int) -> None:
        """From now on only checksums; what ops after the first ``n_ops`` do is no matter of the plan's."""
        report, self._twice = self._report, frozenset()
        self._report = lambda k, reason: report(k, reason) if k < n_ops else None

    def arguments(self, k: int, values: ValueMap, inputs: Sequence[Tensor], written: Sequence[Tensor]) -> Memory:
        """Before the first run: the memory that the second one will read; copies of what the first overwrites."""
        if k not in self._twice:
            return {}
        overwritten = {s._cdata for s in map(storage_of, written) if s is not None}
        storages = [s for s in map(storage_of, inputs) if s is not None]
        return {values.number(s): s.clone() if s._cdata in overwritten else s for s in storages}

    def differs(self, k: int, entry: Entry, made: Mapping[int, Tensor], before: Memory, replay: Replay) -> bool:
        """After the first run: remember what it made, and run again where there is room; whether that differs."""
        facts = facts_of(entry.func)
        if facts.uninitialised:
            return False
        new = {n for position, n in entry.outputs if position not in facts.workspaces}
        self._parts |= {n: _part(made[n]) for n in new}
        compared = new.union(n for n, _ in entry.in_place)
        sums = {n: self._sum(n, made[n].untyped_storage()) for n in compared}
        self._sums |= sums
        self._maker.update(dict.fromkeys(sums, k))
        if k not in self._twice:
            return False
        before |= {n: before[old] for n, old in entry.in_place}
        again = {n: self._sum(n, storage) for n, storage in entry.run(before, replay).items() if n in sums}
        if again == sums:
            return False
        self._report(k, DIFFERS)
        return True

    def has_changed(self, number: int, storage: torch.UntypedStorage) -> bool:
        """Whether a value is not what its op made, although no operator has changed it since."""
        if number not in self._sums or self._sums[number] == self._sum(number, storage):
            return False
        self._report(self._maker[number], CHANGED)
        del self._sums[number]
        return True

    def compare(self, k: int, entry: Entry, made: Memory) -> None:
        """In the backward: what was computed again, beside what the forward made.

        Raises:
            RuntimeError: they differ; the op is reported first, so that the next step keeps what it makes.
        """
        for n, storage in made.items():
            if n in self._sums and self._sums[n] != self._sum(n, storage):
                self._report(k, DIFFERS)
                raise RuntimeError(
                    f"autoremat's check of this first step with a plan: {entry.func} gave something else when it ran "
                    "again than in the forward, so this backward cannot go on. Its result is kept from now on: set the "
                    "gradients to None and repeat the step"
                )

    def _sum(self, number: int, storage: torch.UntypedStorage) -> int:
        return fingerprint(storage, self._parts.get(number, slice(None)))


def _part(tensor: Tensor) -> slice:
    """The bytes of its memory from the tensor's first element to its last one."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return slice(begin, begin + extent * tensor.itemsize)
