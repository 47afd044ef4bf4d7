"""Room: how many bytes may be held where no plan says it, in a first step or off the path."""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import ceil
from typing import Final, Protocol

from autoremat.engines.torch.eager.online import Online
from autoremat.engines.torch.eager.passes import Passes
from autoremat.engines.torch.eager.script import Script

_SLACK: Final = 0.05
"""How far apart the backward of the plan and one off its path may be, as a share of all requests ..."""
_MORE: Final = 8
"""... and so many requests more."""


class Allowance(Protocol):
    """What the budget leaves for what the ledger holds."""

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Bytes that may be held; None: any number.

        Args:
            taken_bytes: what is left for what runs.
            progress: the part of the backward that is through; None in the forward.
        """


class OfFirstStep:
    """What a first step may hold.

    Args:
        share: bytes that may be taken in all beside what is there for good, given what plain training would take.
    """

    def __init__(self, share: Callable[[int], float]) -> None:
        self._share = share
        self._plain_bytes = 0
        """What plain training would hold by now."""
        self._saved: set[int] = set()

    def saved(self, value: int, nbytes: int) -> None:
        """Autograd saves a value; it may have been saved before."""
        if value not in self._saved:
            self._saved.add(value)
            self._plain_bytes += nbytes

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Plain training would take that for what runs, too."""
        return self._share(self._plain_bytes + taken_bytes) - taken_bytes


class OfScript:
    """What a step may hold that has left the path of a script, as far into its backward as it is."""

    def __init__(self, script: Script) -> None:
        self._budget, self._beside = script.budget_bytes, script.beside_bytes

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """What the plan takes for everything else is left for that."""
        if self._budget is None:
            return None
        begin, end = 0, 1
        if progress is not None:
            last = len(self._beside) - 1
            begin, end = int((progress - _SLACK) * last) - _MORE, 1 + ceil((progress + _SLACK) * last) + _MORE
        return self._budget - max(self._beside[max(0, begin) : end]) - taken_bytes


class Room:
    """Keeps what is held within what is allowed, by the online policy.

    Args:
        allowance: what is allowed.
        online: what to let go of.
        passes: how far the backward is.
    """

    def __init__(self, allowance: Allowance, online: Online, passes: Passes) -> None:
        self._allowance, self._online, self._passes = allowance, online, passes
        self._largest_bytes = 0

    def make(self, nbytes: int) -> None:
        """Make room for a call that is about to take so many bytes."""
        self._largest_bytes = max(self._largest_bytes, nbytes)
        self.shrink(needed=nbytes)

    def shrink(self, locked: Collection[int] = (), *, needed: int = 0, in_backward: bool = False) -> None:
        """Let go of what can be made again until what is held is within what is allowed."""
        progress = self._passes.n_served / max(1, self._passes.n_made) if in_backward else None
        allowed = self._allowance.allowed_bytes(2 * self._largest_bytes + needed, progress)
        if allowed is not None:
            self._online.shrink(allowed, locked)
