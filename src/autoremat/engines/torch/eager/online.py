"""The online policy's choice: what to let go of where no plan says it, in a first step or off the path.

After DTR (Kirisame et al. 2021, "Dynamic Tensor Rematerialization", ICLR, section 4.1): the value with the least cost
per byte and staleness goes first; its cost is that of its call and of what would have to be made again before it. Where
room is needed, a little more than that goes at once, so that all searches together take time about linear in the number
of calls. And what is made again is bounded: after ``MOST_RERUNS`` times as many calls as there were, nothing is let go
of any more.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from autoremat.engines.torch.eager.ledger import Ledger

MOST_RERUNS: Final = 3
"""Calls made again, for each call of the forward, after which the policy keeps what it has.

What is gone by then is made again at most once more, so that all in all it is less than two more.
"""
SPARE: Final = 0.1
"""So much more than what is needed goes at once, as a share of what is allowed."""


class Online:
    """The heuristic of DTR on what a ledger holds."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._seconds: dict[int, float] = {}
        self._used: dict[int, int] = {}
        self._regrow: dict[int, float] = {}
        self._clock = 0

    def noted(self, call: int, seconds: float) -> None:
        """Take note of what a call takes."""
        self._seconds[call] = seconds

    def used(self, values: Collection[int]) -> None:
        """Take note of values that are needed now."""
        self._clock += 1
        self._used.update(dict.fromkeys(values, self._clock))

    def shrink(self, allowed: float, locked: Collection[int] = ()) -> None:
        """Let go of values that can be made again until what is held is within what is allowed."""
        ledger = self._ledger
        excess = ledger.bytes_of(ledger.held) - allowed
        if excess <= 0 or ledger.reruns > MOST_RERUNS * max(len(self._seconds), 16):
            return
        excess += SPARE * max(allowed, 0.0)
        for _, value in sorted((self._score(v), v) for v in ledger.held if v in ledger.maker and v not in locked):
            excess -= self._bytes(value)
            self._regrow[value] = self._cost(value)
            ledger.let_go(value)
            if excess <= 0:
                return

    def _bytes(self, value: int) -> int:
        return max(1, self._ledger.held[value].untyped_storage().nbytes())

    def _score(self, value: int) -> float:
        staleness = 1 + self._clock - self._used.get(value, 0)
        return self._cost(value) / (self._bytes(value) * staleness)

    def _cost(self, value: int) -> float:
        call = self._ledger.maker[value]
        gone = (self._regrow.get(v, 0.0) for v in self._ledger.entries[call].reads if v not in self._ledger.held)
        return self._seconds.get(call, 1e-5) + sum(gone)
