"""Room: how many bytes may be held where no plan says it, in a first step or off the path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from math import ceil
from typing import Final, Protocol

from torch import Tensor

from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.online import Online
from autoremat.engines.torch.eager.passes import Passes
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.spare import Spare
from autoremat.engines.torch.operators.local import local_of

_SLACK: Final = 0.05
"""How far apart the backward of the plan and one off its path may be, as a share of all requests ..."""
_MORE: Final = 8
"""... and so many requests more."""
_MARGIN: Final = 0.02
"""What a first step leaves for what nobody counts, as a share of what it may take."""
_SCRATCH: Final = 0.3
"""The most that is left for what kernels take beside, as a share of what a first step may take."""


class Allowance(Protocol):
    """What the budget leaves for what a step makes."""

    def taken_bytes(self, needed_bytes: int, largest_bytes: int) -> int:
        """What room is left for, given what the next call makes, and the largest so far."""

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Bytes of what the step has made that there may be; None: any number.

        Args:
            taken_bytes: what is left for what runs.
            progress: the part of the backward that is through; None in the forward.
        """

    def all_bytes(self) -> float:
        """Bytes that there are for all that the step makes."""

    def counted(self, nbytes: int) -> None:
        """So much of what autograd has saved is counted with what the step has made from now on."""


class OfFirstStep:
    """What a first step may hold.

    Args:
        share: bytes that may be taken in all beside what is there for good, given what plain training would take.
    """

    def __init__(self, share: Callable[[int], float]) -> None:
        self._share = share
        self.plain_bytes = 0
        """What plain training would hold by now."""
        self._saved: set[int] = set()

    def taken_bytes(self, needed_bytes: int, largest_bytes: int) -> int:
        """A plan will say what is held in the backward; but kernels take more than they give."""
        return needed_bytes + int(min(2 * needed_bytes, _SCRATCH * max(0.0, self._share(self.plain_bytes))))

    def saved(self, value: int, nbytes: int) -> None:
        """Autograd saves a value; it may have been saved before."""
        if value not in self._saved:
            self._saved.add(value)
            self.plain_bytes += nbytes

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """Plain training would take that for what runs, too."""
        return (1 - _MARGIN) * self._share(self.plain_bytes + taken_bytes) - taken_bytes

    def all_bytes(self) -> float:
        """Of what plain training would hold by now."""
        return self._share(self.plain_bytes)

    def counted(self, nbytes: int) -> None:
        """It counts all of it."""


class OfScript:
    """What a step may hold that has left the path of a script, as far into its backward as it is.

    Args:
        script: whose path.
        n_calls: calls after which it was left.
        growth: by so much what is made is larger than recorded.
        others_bytes: of the graphs of earlier calls.
    """

    def __init__(self, script: Script, n_calls: int = 0, growth: float = 1.0, others_bytes: int = 0) -> None:
        self._script, self._others_bytes = script, others_bytes
        self._saved_bytes = growth * script.saved_bytes[min(n_calls, len(script.saved_bytes) - 1)]
        self._beside, self._asked = (self._grown(made, growth) for made in (script.beside_bytes, script.asked_bytes))
        """What was taken beside values of the tape when the step was recorded, as large as it is now."""
        self._again_bytes = 0

    def _grown(self, beside: Sequence[int], growth: float) -> list[float]:
        fixed, gradients = self._script.fixed_bytes, self._script.gradient_bytes
        return [growth * (made - fixed - known) + known for made, known in zip(beside, gradients, strict=False)]

    def taken_bytes(self, needed_bytes: int, largest_bytes: int) -> int:
        """Nobody knows what will have to be made again at once; and kernels take more than they give."""
        self._again_bytes = 2 * largest_bytes
        return needed_bytes + int(min(2 * needed_bytes, _SCRATCH * (self._script.budget_bytes or 0)))

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """What the plan takes for everything else is left for that."""
        script, beside = self._script, self._beside
        if script.budget_bytes is None:
            return None
        if progress is None:
            made = beside[0] + taken_bytes
        else:
            last = len(beside) - 1
            begin, end = int((progress - _SLACK) * last) - _MORE, 1 + ceil((progress + _SLACK) * last) + _MORE
            begin = max(1 if last else 0, begin)
            made = max(max(beside[begin:end]), max(self._asked[begin:end], default=0.0) + self._again_bytes)
        return script.budget_bytes - script.fixed_bytes - made - self._saved_bytes - self._others_bytes

    def all_bytes(self) -> float:
        """The budget, less what is always there."""
        return (self._script.budget_bytes or 0) - self._script.fixed_bytes - self._others_bytes

    def counted(self, nbytes: int) -> None:
        """So much of what autograd has saved is counted with what the step has made from now on."""
        self._saved_bytes = max(0.0, self._saved_bytes - nbytes)


class Nothing:
    """Where the device has no room: nothing may be held that can be made again."""

    def taken_bytes(self, needed_bytes: int, largest_bytes: int) -> int:
        """Whatever it is."""
        return 0

    def allowed_bytes(self, taken_bytes: int, progress: float | None) -> float | None:
        """None at all."""
        return 0.0

    def all_bytes(self) -> float:
        """None."""
        return 0.0

    def counted(self, nbytes: int) -> None:
        """It counts all of it."""


class Room:
    """Keeps all that a step has made within what is allowed, by the online policy.

    Args:
        allowance: what is allowed.
        ledger: what is held.
        passes: how far the backward is.
        may_go: whether letting go of a value that is held gives its memory back, and nothing is lost by it.
        n_calls: calls of the forward that were made before.
        spare: of these; what is to be had of it is, as soon as room is needed.
    """

    def __init__(
        self, allowance: Allowance, ledger: Ledger, passes: Passes, may_go: Callable[[int], bool], n_calls: int = 0,
        spare: Spare | None = None,
    ) -> None:  # fmt: skip
        self._allowance, self._passes, self._spare = allowance, passes, spare
        self.online = Online(ledger, may_go, n_calls)
        self._largest_bytes = 0

    def make(self, nbytes: int) -> None:
        """Make room for a call that is about to take so many bytes."""
        self._largest_bytes = max(self._largest_bytes, nbytes)
        self.shrink(needed=nbytes)

    def made(self, tensor: Tensor) -> None:
        """A call has made this."""
        self.online.meter.add(local_of(tensor))

    def fits(self, calls: Iterable[int]) -> bool:
        """Whether there is room to make these calls again, one after the other."""
        return self.has(3 * max((self.online.nbytes.get(k, 0) for k in calls), default=0))

    def has(self, nbytes: int) -> bool:
        """Whether there is room for so many bytes."""
        allowed = self._allowance.allowed_bytes(nbytes, None)
        return allowed is None or self.online.meter.nbytes <= allowed

    def shrink(self, locked: Collection[int] = (), *, needed: int = 0, in_backward: bool = False) -> None:
        """Let go of what can be made again until what there is is within what is allowed."""
        progress = self._passes.n_served / max(1, self._passes.n_made) if in_backward else None
        taken = self._allowance.taken_bytes(needed, self._largest_bytes)
        allowed = self._allowance.allowed_bytes(taken, progress)
        if allowed is None:
            return
        if self._spare is not None and self.online.meter.nbytes > allowed:
            self._turn(self._spare)
            allowed = self._allowance.allowed_bytes(taken, progress) or 0.0
        if impatience := self.online.impatience:
            allowed = max(allowed, impatience * self._allowance.all_bytes())
        self.online.shrink(allowed, locked)

    def empty(self) -> None:
        """Let go of all that can be made again."""
        if self._spare is not None:
            self._turn(self._spare)
        self.online.shrink(0.0)

    def _turn(self, spare: Spare) -> None:
        self._spare = None
        self._allowance.counted(spare.turn())
