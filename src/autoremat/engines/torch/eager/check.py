"""The self-check of a first step: reruns must give the same.

Right after a call that the plan reruns, it is rerun where the budget has room for that, and both results are compared.
What differs is kept, in this step and from then on. Checksums of the results tell at every later look whether they were
changed behind torch's back; then they are kept as they are now. In the backward, what was recomputed is compared with
the checksum; by then nothing can be mended, so a difference is an error there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from torch import Tensor

from autoremat.engines.torch.eager.draws import Disturbed
from autoremat.engines.torch.eager.entry import Entry
from autoremat.engines.torch.eager.ledger import copy_of
from autoremat.engines.torch.eager.path import Pair
from autoremat.engines.torch.eager.state import Rerunning
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import fingerprint, storage_of
from autoremat.engines.torch.world.memory import is_out_of_memory
from autoremat.program.once import Once, Reason

DIFFERS: Final = Reason(Once.DIFFERS)
CHANGED: Final = Reason(Once.MADE_IS_CHANGED)


class Differs(RuntimeError):
    """A rerun gave something else, and it is too late to mend."""


class NoCheck:
    """Compares nothing."""

    is_looking = False

    def before(
        self, k: int, given: Sequence[Tensor], reads: Sequence[Pair], written: Collection[int], *, has_room: bool = True
    ) -> None:  # fmt: skip
        """Prepare for a call that may be rerun."""

    def has_no_room(self) -> None:
        """Do not rerun the call that has just been made."""

    def differs(self, k: int, entry: Entry, made: Sequence[Tensor]) -> bool:
        """Tell, after a call, whether its rerun gives something else."""
        return False

    def noted(self, k: int, results: Sequence[Pair], made: Sequence[Tensor]) -> None:
        """Note the values that a call has made."""

    def has_changed(self, value: int, tensor: Tensor) -> bool:
        """Tell whether a value was changed behind torch's back."""
        return False

    def remade(self, k: int, entry: Entry, made: dict[int, Tensor]) -> None:
        """Look at what a rerun has made."""

    def forget(self, *values: int) -> None:
        """Forget values that have been overwritten."""


class SelfCheck(NoCheck):
    """Compares checksums of what one forward made.

    Args:
        twice: calls for whose immediate rerun there is room; None where nobody knows that yet.
        on_difference: called with the call and the reason why it must not be rerun.
    """

    is_looking = True

    def __init__(self, twice: Collection[int] | None, on_difference: Callable[[int, Reason], None]) -> None:
        self._twice, self._report = twice, on_difference
        self._sums: dict[int, int] = {}
        self._parts: dict[int, slice] = {}
        """The bytes of a value in its memory.

        Some kernels leave bytes around it that mean nothing.
        """
        self._maker: dict[int, int] = {}
        self._memory: dict[int, Tensor] | None = None

    def before(
        self, k: int, given: Sequence[Tensor], reads: Sequence[Pair], written: Collection[int], *, has_room: bool = True
    ) -> None:  # fmt: skip
        """Keep the memory that a rerun will read, copied where overwritten."""
        self._memory = None
        if has_room and (self._twice is None or k in self._twice):
            self._memory = {}
            overwritten = {value for i, value in reads if i in written}
            for i, value in reads:
                if value not in self._memory:
                    local = local_of(given[i]).detach()
                    self._memory[value] = copy_of(local) if value in overwritten else local

    def has_no_room(self) -> None:
        """Do not rerun the call that has just been made."""
        self._memory = None

    def differs(self, k: int, entry: Entry, made: Sequence[Tensor]) -> bool:
        """Remember a call's results; tell whether a rerun's differ.

        The rerun happens only where there is room for it.
        """
        self.noted(k, entry.results, made)
        memory, self._memory = self._memory, None
        if memory is None:
            return False
        wanted = {v for v in entry.makes if v in self._sums}
        if self._rerun_agrees(entry, memory, wanted):
            return False
        self._report(k, DIFFERS)
        return True

    def _rerun_agrees(self, entry: Entry, memory: dict[int, Tensor], wanted: Collection[int]) -> bool:
        """Tell whether a rerun gives what the first run gave.

        True also where the device has no room for the rerun.
        """
        try:
            with Rerunning() as rerunning:
                again = entry.run(memory, rerunning, wanted)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) or isinstance(error, Disturbed):
                return True
            raise
        return all(self._sum(v, t) == self._sums[v] for v, t in again.items() if v in self._sums)

    def noted(self, k: int, results: Sequence[Pair], made: Sequence[Tensor]) -> None:
        """Remember what a call has made."""
        for i, value in results:
            tensor = local_of(made[i])
            if storage_of(tensor) is not None:
                self._parts[value] = _part(tensor)
                self._sums[value] = self._sum(value, tensor)
                self._maker[value] = k

    def has_changed(self, value: int, tensor: Tensor) -> bool:
        """Tell whether a value was changed behind torch's back."""
        if value not in self._sums or self._sums[value] == self._sum(value, local_of(tensor)):
            return False
        self._report(self._maker[value], CHANGED)
        del self._sums[value]
        return True

    def forget(self, *values: int) -> None:
        """Forget values that have been overwritten."""
        for value in values:
            self._sums.pop(value, None)

    def remade(self, k: int, entry: Entry, made: dict[int, Tensor]) -> None:
        """Compare, in the backward, what a rerun made with the forward's.

        Raises:
            Differs: they do; the call is reported first, so that the next step keeps what it makes.
        """
        for value, tensor in made.items():
            if value in self._sums and self._sums[value] != self._sum(value, tensor):
                self._report(k, DIFFERS)
                name = getattr(entry.func, "__name__", str(entry.func))
                raise Differs(
                    f"autoremat's check of this first step with a plan: {name} gave something else when it ran again "
                    "than in the forward, so this backward cannot go on. Its result is kept from now on: set the "
                    "gradients to None and repeat the step"
                )

    def _sum(self, value: int, tensor: Tensor) -> int:
        return fingerprint(tensor.untyped_storage(), self._parts.get(value, slice(None)))


def _part(tensor: Tensor) -> slice:
    """Return the bytes of memory from first to last element."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return slice(begin, begin + extent * tensor.itemsize)
