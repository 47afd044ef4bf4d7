"""The self-check of a first step: what is made again must be what was made the first time.

Right after a call that the plan makes again, it is made a second time, where the budget has room for that, and both
results are compared. What differs is kept, in this step and from then on. Checksums of the results tell at every later
look whether something that torch does not see has changed them: then they are kept as they are now. In the backward,
what was made again is compared with the checksum; by then nothing can be mended, so a difference is an error there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final

from torch import Tensor

from autoremat.engines.torch.eager.draws import Disturbed
from autoremat.engines.torch.eager.entry import Entry
from autoremat.engines.torch.eager.ledger import copy_of
from autoremat.engines.torch.eager.path import Pair
from autoremat.engines.torch.eager.state import Replay
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import fingerprint, storage_of
from autoremat.engines.torch.world.memory import is_out_of_memory
from autoremat.program.once import Once, Reason

DIFFERS: Final = Reason(Once.DIFFERS)
CHANGED: Final = Reason(Once.MADE_IS_CHANGED)


class Differs(RuntimeError):
    """A call that was made again gave something else than the first time, and it is too late to keep that."""


class NoCheck:
    """Compares nothing."""

    is_looking = False

    def before(
        self, k: int, given: Sequence[Tensor], reads: Sequence[Pair], written: Collection[int], *, has_room: bool = True
    ) -> None:  # fmt: skip
        """Before a call that may be made again."""

    def differs(self, k: int, entry: Entry, made: Sequence[Tensor]) -> bool:
        """After it: whether it gives something else when it is made again."""
        return False

    def noted(self, k: int, results: Sequence[Pair], made: Sequence[Tensor]) -> None:
        """After a call that has made these values."""

    def has_changed(self, value: int, tensor: Tensor) -> bool:
        """Whether a value is not what its call made, although no call has changed it since."""
        return False

    def remade(self, k: int, entry: Entry, made: dict[int, Tensor]) -> None:
        """After it has been made again."""

    def forget(self, value: int) -> None:
        """A value has been overwritten."""


class SelfCheck(NoCheck):
    """Checksums of what one forward made, and the comparisons.

    Args:
        twice: calls for whose second run, right after the first, there is room; None where nobody knows that yet.
        on_difference: called with the call and the reason why it must not be made again.
    """

    is_looking = True

    def __init__(self, twice: Collection[int] | None, on_difference: Callable[[int, Reason], None]) -> None:
        self._twice, self._report = twice, on_difference
        self._sums: dict[int, int] = {}
        self._parts: dict[int, slice] = {}
        """Where in its memory a value is: some kernels leave bytes beside it that mean nothing."""
        self._maker: dict[int, int] = {}
        self._memory: dict[int, Tensor] | None = None

    def before(
        self, k: int, given: Sequence[Tensor], reads: Sequence[Pair], written: Collection[int], *, has_room: bool = True
    ) -> None:  # fmt: skip
        """Before a call: the memory that a second run will read; copies of what the first overwrites."""
        self._memory = None
        if has_room and (self._twice is None or k in self._twice):
            self._memory = {}
            overwritten = {value for i, value in reads if i in written}
            for i, value in reads:
                if value not in self._memory:
                    local = local_of(given[i]).detach()
                    self._memory[value] = copy_of(local) if value in overwritten else local

    def differs(self, k: int, entry: Entry, made: Sequence[Tensor]) -> bool:
        """After the first run: remember what it made, and run again where there is room; whether that differs."""
        self.noted(k, entry.results, made)
        memory, self._memory = self._memory, None
        if memory is None:
            return False
        wanted = {v for v in entry.makes if v in self._sums}
        if self._is_made_again(entry, memory, wanted):
            return False
        self._report(k, DIFFERS)
        return True

    def _is_made_again(self, entry: Entry, memory: dict[int, Tensor], wanted: Collection[int]) -> bool:
        """Whether a second run gives what the first one gave; so it seems, too, where the device has no room for it."""
        try:
            with Replay() as replay:
                again = entry.run(memory, replay, wanted)
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
        """Whether a value is not what its call made, although no call has changed it since."""
        if value not in self._sums or self._sums[value] == self._sum(value, local_of(tensor)):
            return False
        self._report(self._maker[value], CHANGED)
        del self._sums[value]
        return True

    def forget(self, value: int) -> None:
        """A value has been overwritten."""
        self._sums.pop(value, None)

    def remade(self, k: int, entry: Entry, made: dict[int, Tensor]) -> None:
        """In the backward: what was made again, beside what the forward made.

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
    """The bytes of its memory from the tensor's first element to its last one."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    begin = int(tensor.storage_offset()) * tensor.itemsize
    return slice(begin, begin + extent * tensor.itemsize)
