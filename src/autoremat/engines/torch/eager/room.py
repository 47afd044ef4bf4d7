"""Room: how many bytes may be held where no plan decides.

That is the case in a first step, and off the path.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from math import ceil, inf
from typing import Final, Protocol

from torch import Tensor

from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.online import Online
from autoremat.engines.torch.eager.passes import Passes
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.spare import Spare
from autoremat.engines.torch.operators.local import local_of

_SLACK: Final = 0.05
"""How far progress off the path may differ from the plan's.

As a share of all requests of the backward.
"""
_MORE: Final = 8
"""Requests added to that slack."""
_MARGIN: Final = 0.02
"""What a first step leaves for uncounted memory, as a share."""
_SCRATCH: Final = 0.3
"""The most left for kernels' temporaries, as a share.

Of what a first step may take.
"""


_TIMES_THE_PLAN: Final = 3
"""How many times as often as the plan a step off the path reruns calls before it holds more than is allowed."""


class Allowance(Protocol):
    """What the budget leaves for what a step makes."""

    @property
    def patience(self) -> float:
        """Reruns per call before more is held than is allowed."""

    def largest_call(self, nbytes: int) -> None:
        """Note the most that a call has made so far."""

    def least_bytes(self) -> float:
        """Return what may be held at any moment.

        Three times what the next call makes is to be taken from it.
        """

    def taken_bytes(self, needed_bytes: int) -> int:
        """Return the bytes to leave free for a call of so many."""

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Return the bytes that the step's values may take; None: any number.

        Args:
            taken_bytes: what is left for what runs.
            progress: the part of the backward that is done; None in the forward.
        """

    def all_bytes(self) -> float:
        """Return the bytes that there are for all that the step makes."""

    def counted(self, nbytes: int) -> None:
        """Count bytes that autograd saved among the step's values from now on."""


class OfFirstStep:
    """What a first step may hold.

    Args:
        share: bytes that may be taken besides what is always there, given what plain training would take.
    """

    patience = 1.0

    def __init__(self, share: Callable[[int], float]) -> None:
        self._share = share
        self.plain_bytes = 0
        """What plain training would hold by now."""
        self._saved: set[int] = set()

    def largest_call(self, nbytes: int) -> None:
        """Do nothing."""

    def least_bytes(self) -> float:
        """Return 0: what is allowed grows with the step."""
        return 0.0

    def taken_bytes(self, needed_bytes: int) -> int:
        """Leave room for kernels, which take more than their results.

        What is held in the backward, a plan will say.
        """
        return needed_bytes + int(min(3 * needed_bytes, _SCRATCH * max(0.0, self._share(self.plain_bytes))))

    def saved(self, value: int, nbytes: int) -> None:
        """Note that autograd saves a value, perhaps not for the first time."""
        if value not in self._saved:
            self._saved.add(value)
            self.plain_bytes += nbytes

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Allow a share of what plain training would take, less what runs."""
        return (1 - _MARGIN) * self._share(self.plain_bytes + taken_bytes) - taken_bytes

    def all_bytes(self) -> float:
        """Return the share of what plain training would hold by now."""
        return self._share(self.plain_bytes)

    def counted(self, nbytes: int) -> None:
        """Do nothing: all of it is counted already."""


class OfScript:
    """What a step that left a script's path may hold.

    The script tells how much is needed at the same point of its backward.

    Args:
        script: whose path.
        n_calls: calls after which it was left.
        growth: the factor by which results are larger than recorded.
        others_bytes: of the graphs of earlier calls.
    """

    def __init__(self, script: Script, n_calls: int = 0, growth: float = 1.0, others_bytes: int = 0) -> None:
        self._script, self._others_bytes = script, others_bytes
        self._saved_bytes = growth * script.saved_bytes[min(n_calls, len(script.saved_bytes) - 1)]
        self._beside, self._asked = (self._grown(made, growth) for made in (script.beside_bytes, script.asked_bytes))
        """What the recorded step took besides the tape's values, scaled by growth."""
        self._rerun_bytes = 0
        self.patience = max(1.0, _TIMES_THE_PLAN * script.n_reruns / max(1, len(script.funcs)))

    def _grown(self, beside: Sequence[int], growth: float) -> list[float]:
        fixed, gradients = self._script.fixed_bytes, self._script.gradient_bytes
        return [growth * (made - fixed - known) + known for made, known in zip(beside, gradients, strict=False)]

    def largest_call(self, nbytes: int) -> None:
        """Leave room for reruns of this call."""
        self._rerun_bytes = 2 * nbytes

    def least_bytes(self) -> float:
        """Return the budget less the most that the plan accounts for otherwise."""
        if self._script.budget_bytes is None:
            return inf
        most = max(max(self._beside), max(self._asked, default=0.0) + self._rerun_bytes)
        return self._script.budget_bytes - self._script.fixed_bytes - most - self._saved_bytes - self._others_bytes

    def taken_bytes(self, needed_bytes: int) -> int:
        """Leave room for kernels."""
        return needed_bytes + int(min(2 * needed_bytes, _SCRATCH * (self._script.budget_bytes or 0)))

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Return the budget less everything that the plan accounts for otherwise."""
        script, beside = self._script, self._beside
        if script.budget_bytes is None:
            return None
        if progress is None:
            made = beside[0] + taken_bytes
        else:
            last = len(beside) - 1
            begin, end = int((progress - _SLACK) * last) - _MORE, 1 + ceil((progress + _SLACK) * last) + _MORE
            begin = max(1 if last else 0, begin)
            made = max(max(beside[begin:end]), max(self._asked[begin:end], default=0.0) + self._rerun_bytes)
        return script.budget_bytes - script.fixed_bytes - made - self._saved_bytes - self._others_bytes

    def all_bytes(self) -> float:
        """Return the budget, less what is always there."""
        return (self._script.budget_bytes or 0) - self._script.fixed_bytes - self._others_bytes

    def counted(self, nbytes: int) -> None:
        """Count bytes that autograd saved among the step's values from now on."""
        self._saved_bytes = max(0.0, self._saved_bytes - nbytes)


class Nothing:
    """Where the device has no room: hold nothing that can be recomputed."""

    patience = 1.0

    def largest_call(self, nbytes: int) -> None:
        """Do nothing."""

    def least_bytes(self) -> float:
        """Return 0."""
        return 0.0

    def taken_bytes(self, needed_bytes: int) -> int:
        """Leave nothing free."""
        return 0

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Allow nothing."""
        return 0.0

    def all_bytes(self) -> float:
        """Return 0."""
        return 0.0

    def counted(self, nbytes: int) -> None:
        """Do nothing."""


class Room:
    """Keeps what a step made within bounds, by the online policy.

    Args:
        allowance: what is allowed.
        ledger: what is held.
        passes: how far the backward is.
        may_go: whether dropping a held value frees its memory and loses nothing.
        n_calls: calls of the forward that were made before.
        spare: what was prepared in these; it is used as soon as room is needed.
    """

    def __init__(
        self, allowance: Allowance, ledger: Ledger, passes: Passes, may_go: Callable[[int], bool], n_calls: int = 0,
        spare: Spare | None = None,
    ) -> None:  # fmt: skip
        self._allowance, self._passes, self._spare = allowance, passes, spare
        self.online = Online(ledger, may_go, n_calls, allowance.patience)
        self._largest_bytes = 0
        self._least_bytes = allowance.least_bytes()

    def make(self, nbytes: int) -> None:
        """Make room for a call that will take so many bytes."""
        if nbytes > self._largest_bytes:
            self._largest_bytes = nbytes
            self._allowance.largest_call(nbytes)
            self._least_bytes = self._allowance.least_bytes()
        self.shrink(needed=nbytes)

    def made(self, tensor: Tensor) -> None:
        """Count what a call has made."""
        self.online.meter.add(local_of(tensor))

    def learn(self, costs: Sequence[tuple[float, int]]) -> None:
        """Take a rerun's seconds and bytes, by call, from a program."""
        for call in self.online.nbytes:
            self.online.noted(call, *costs[call])

    def fits(self, call: int) -> bool:
        """Tell whether there is room to rerun a call of known bytes."""
        return self.online.meter.nbytes + self.online.nbytes.get(call, 0) <= self._allowance.all_bytes()

    def has(self, nbytes: int) -> bool:
        """Tell whether there is room for so many bytes."""
        allowed = self._allowance.allowed_bytes(nbytes, None)
        return allowed is None or self.online.meter.nbytes <= allowed

    def is_enough(self, *, in_backward: bool) -> bool:
        """Tell whether a rerun has the room left for it."""
        allowed = self._allowed_bytes(0, in_backward=in_backward)
        return allowed is None or self.online.meter.nbytes <= allowed

    def shrink(self, locked: Container[int] = (), *, needed: int = 0, in_backward: bool = False) -> None:
        """Drop what can be recomputed until the rest is within bounds."""
        if self.online.meter.nbytes + 3 * needed <= self._least_bytes:
            return  # as almost always; asking what is allowed right now takes a while
        allowed = self._allowed_bytes(needed, in_backward=in_backward)
        if allowed is None or self.online.meter.nbytes <= allowed:
            self.online.has_room()
            return
        if self._spare is not None:
            self._turn(self._spare)
            allowed = self._allowed_bytes(needed, in_backward=in_backward) or 0.0
        if impatience := self.online.impatience:
            allowed = max(allowed, impatience * self._allowance.all_bytes())
        self.online.shrink(allowed, locked)

    def _allowed_bytes(self, needed: int, *, in_backward: bool) -> float | None:
        progress = self._passes.n_served / max(1, self._passes.n_made) if in_backward else None
        taken = self._allowance.taken_bytes(needed)
        return self._allowance.allowed_bytes(taken, progress)

    def empty(self) -> None:
        """Drop everything that can be recomputed."""
        if self._spare is not None:
            self._turn(self._spare)
        self.online.shrink(0.0)

    def _turn(self, spare: Spare) -> None:
        self._spare = None
        self._allowance.counted(spare.turn())
        self._least_bytes = self._allowance.least_bytes()
