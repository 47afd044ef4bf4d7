"""The online policy: what to drop where no plan decides.

That is the case in a first step, and off the path. The policy follows DTR (Kirisame et al. 2021, "Dynamic Tensor
Rematerialization", ICLR, section 4.1): the value with the least cost per byte and staleness goes first; its cost is
that of its call, and of what would have to be recomputed before it.

Searches are rare: where room is needed, a little more than that is dropped at once, and where nothing could be dropped,
the next search waits until more is held, or until half of it has gone. So all searches together take time about linear
in the number of calls.

Reruns are bounded. Where next to nothing may be held, every value takes a long chain of reruns. So once as many calls
have been rerun as there were, or several times as many as a plan for the same budget reruns, more and more is held, at
the expense of room left for other things: after ``FURTHER_RERUNS`` times as many as there were, all that there is, and
from then on nothing is dropped any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from typing import Final

from autoremat.engines.torch.eager.ledger import Ledger, Meter

FURTHER_RERUNS: Final = 2
"""Reruns, per call of the forward and beyond patience, after which everything is held.

What is gone by then is recomputed at most once more, so that all in all it is less than two more.
"""
SPARE: Final = 0.1
"""Share of what is allowed that is dropped beyond the need."""
MORE: Final = 0.02
"""Growth of what is held before the next search after failure."""


class Online:
    """The heuristic of DTR on what a ledger holds.

    Args:
        ledger: of the step; from now on it counts the bytes that there are.
        can_go: whether dropping a held value frees its memory.
        n_calls: calls of the forward that were made before.
        patience: reruns per call of the forward before more is held than is allowed.
    """

    def __init__(
        self, ledger: Ledger, can_go: Callable[[int], bool], n_calls: int = 0, patience: float = 1.0
    ) -> None:  # fmt: skip
        self._ledger, self._can_go, self._n_calls, self._patience = ledger, can_go, n_calls, patience
        self._seconds: dict[int, float] = {}
        self.nbytes: dict[int, int] = {}
        """By call, the bytes of what it makes, temporaries included."""
        self._used: dict[int, int] = {}
        self._regrow: dict[int, float] = {}
        self._clock = 0
        self.meter = ledger.meter = Meter(ledger.held.values())
        self._in_vain_bytes = 0
        """Up to this many bytes held, another search would find nothing."""

    def noted(self, call: int, seconds: float, nbytes: int) -> None:
        """Note the seconds and bytes of a call."""
        self._seconds[call], self.nbytes[call] = seconds, nbytes

    def used(self, values: Collection[int]) -> None:
        """Note which values are needed now."""
        self._clock += 1
        for value in values:
            self._used[value] = self._clock

    def has_room(self) -> None:
        """Note that what is held is within bounds.

        Once half of what no search could lower has gone, the next one may find something.
        """
        if 2 * self.meter.nbytes < self._in_vain_bytes:
            self._in_vain_bytes = 0

    def shrink(self, allowed: float, locked: Container[int] = ()) -> None:
        """Drop values that can be recomputed until the rest is within bounds."""
        ledger, meter = self._ledger, self.meter
        if meter.nbytes <= max(allowed, self._in_vain_bytes) or self.impatience == 1:
            return
        target = allowed - SPARE * max(allowed, 0.0)
        for _, value in sorted((self._score(v), v) for v in ledger.held if v in ledger.maker and v not in locked):
            if self._can_go(value):
                self._regrow[value] = self._cost(value)
                ledger.let_go(value)
                if meter.nbytes <= target:
                    self._in_vain_bytes = 0
                    return
        self._in_vain_bytes = int((1 + MORE) * meter.nbytes)

    @property
    def impatience(self) -> float:
        """The share of all room, 0 to 1, held to avoid reruns."""
        times = self._ledger.reruns / max(self._n_calls + len(self._seconds), 16)
        return min(1.0, max(0.0, (times - self._patience) / FURTHER_RERUNS))

    def _bytes(self, value: int) -> int:
        return max(1, self._ledger.held[value].untyped_storage().nbytes())

    def _score(self, value: int) -> float:
        staleness = 1 + self._clock - self._used.get(value, 0)
        return self._cost(value) / (self._bytes(value) * staleness)

    def _cost(self, value: int) -> float:
        call = self._ledger.maker[value]
        gone = (self._regrow.get(v, 0.0) for v in self._ledger.entries[call].reads if v not in self._ledger.held)
        return self._seconds.get(call, 1e-5) + sum(gone)
