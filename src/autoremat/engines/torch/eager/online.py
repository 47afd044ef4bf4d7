"""The online policy: what to let go of where no plan says it, in a first step or off the path.

After DTR (Kirisame et al. 2021, "Dynamic Tensor Rematerialization", ICLR, section 4.1): the value with the least cost
per byte and staleness goes first; its cost is that of its call and of what would have to be made again before it.

Searches are rare: where room is needed, a little more than that goes at once, and where nothing could be let go of,
nobody looks again before more is held. So all of them together take time about linear in the number of calls.

What is made again is bounded. Where next to nothing may be held, making it takes a long way each time; so once as many
calls have been made again as there were, more and more is held, whatever was left for other things: all that there is
after ``MOST_RERUNS`` times as many, and from then on nothing is let go of any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from autoremat.engines.torch.eager.ledger import Ledger, Meter

MOST_RERUNS: Final = 3
"""Calls made again, for each call of the forward, after which the policy keeps what it has.

What is gone by then is made again at most once more, so that all in all it is less than two more.
"""
SPARE: Final = 0.1
"""So much more than what is needed goes at once, as a share of what is allowed."""
MORE: Final = 0.02
"""By so much what is held must have grown before another search follows one in vain."""


class Online:
    """The heuristic of DTR on what a ledger holds.

    Args:
        ledger: of the step; from now on it is counted what there is.
        can_go: whether letting go of a value that is held gives its memory back.
        n_calls: calls of the forward that were made before.
    """

    def __init__(self, ledger: Ledger, can_go: Callable[[int], bool], n_calls: int = 0) -> None:
        self._ledger, self._can_go, self._n_calls = ledger, can_go, n_calls
        self._seconds: dict[int, float] = {}
        self.nbytes: dict[int, int] = {}
        """For every call what it makes and takes beside."""
        self._used: dict[int, int] = {}
        self._regrow: dict[int, float] = {}
        self._clock = 0
        self.meter = ledger.meter = Meter(ledger.held.values())
        self._in_vain_bytes = 0
        """Up to so many bytes held another search would not find anything."""

    def noted(self, call: int, seconds: float, nbytes: int) -> None:
        """Take note of what a call takes."""
        self._seconds[call], self.nbytes[call] = seconds, nbytes

    def used(self, values: Collection[int]) -> None:
        """Take note of values that are needed now."""
        self._clock += 1
        self._used.update(dict.fromkeys(values, self._clock))

    def shrink(self, allowed: float, locked: Collection[int] = ()) -> None:
        """Let go of values that can be made again until all that the step has made is within what is allowed."""
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
        """From 0 to 1: the share of all room that is held rather than making so much again any longer."""
        times = self._ledger.reruns / max(self._n_calls + len(self._seconds), 16)
        return min(1.0, max(0.0, (times - 1) / (MOST_RERUNS - 1)))

    def _bytes(self, value: int) -> int:
        return max(1, self._ledger.held[value].untyped_storage().nbytes())

    def _score(self, value: int) -> float:
        staleness = 1 + self._clock - self._used.get(value, 0)
        return self._cost(value) / (self._bytes(value) * staleness)

    def _cost(self, value: int) -> float:
        call = self._ledger.maker[value]
        gone = (self._regrow.get(v, 0.0) for v in self._ledger.entries[call].reads if v not in self._ledger.held)
        return self._seconds.get(call, 1e-5) + sum(gone)
