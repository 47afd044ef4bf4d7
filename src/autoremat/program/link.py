"""``Link``: the way to a slower tier of memory and back.

With it come the clocks of compute and link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoremat.program.errors import InvalidProgram


@dataclass(frozen=True, slots=True)
class Link:
    """Rates of copies to a slower tier and back.

    Beside them stands how many bytes the tier takes.

    Attributes:
        out_bytes_per_second: of copies to the tier.
        in_bytes_per_second: of copies back.
        latency_seconds: that every copy takes besides.
        takes_turns: one copy at a time, whichever way it goes; else one at a time each way.
        tier_bytes: the most bytes that may be in the tier at a time, 0 for none; None where nobody limits them.
        name: what a person calls the tier, such as ``disk:/scratch``.

    Raises:
        InvalidProgram: a bandwidth that is not positive, a negative latency or limit.
    """

    out_bytes_per_second: float
    in_bytes_per_second: float
    latency_seconds: float = 0.0
    takes_turns: bool = True
    tier_bytes: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("out_bytes_per_second", "in_bytes_per_second"):
            if not 0 < getattr(self, field) < math.inf:
                raise InvalidProgram(f"link: {field} must be positive and finite, got {getattr(self, field)}")
        if not 0 <= self.latency_seconds < math.inf:
            raise InvalidProgram(f"link: latency_seconds must not be negative, got {self.latency_seconds}")
        if self.tier_bytes is not None and self.tier_bytes < 0:
            raise InvalidProgram(f"link: tier_bytes must not be negative, got {self.tier_bytes}")

    def out_seconds(self, nbytes: int) -> float:
        """Seconds of one copy to the tier."""
        return self.latency_seconds + nbytes / self.out_bytes_per_second

    def in_seconds(self, nbytes: int) -> float:
        """Seconds of one copy back."""
        return self.latency_seconds + nbytes / self.in_bytes_per_second


class Clocks:
    """Clocks of the ops and of each way of a link.

    A way starts a copy when it is told to and free.

    Args:
        link: that moves the bytes.

    Attributes:
        now_seconds: since the step began.
        waited_seconds: in which no op ran, because a copy had not ended.
    """

    def __init__(self, link: Link) -> None:
        self.now_seconds = self.waited_seconds = 0.0
        self._link = link
        self._free_at = {"out": 0.0, "in": 0.0}
        self._ends: dict[tuple[str, int], float] = {}

    def run(self, seconds: float) -> None:
        """Let an op run."""
        self.now_seconds += seconds

    def begin(self, way: str, value: int, nbytes: int) -> tuple[float, float]:
        """Begin to copy a value, ``out`` or ``in``.

        Returns the seconds at which the link begins with it, and ends.
        """
        copy = self._link.out_seconds(nbytes) if way == "out" else self._link.in_seconds(nbytes)
        free_at = max(self._free_at.values()) if self._link.takes_turns else self._free_at[way]
        begin = max(self.now_seconds, free_at)
        self._free_at[way] = self._ends[way, value] = begin + copy
        return begin, begin + copy

    def wait(self, way: str, value: int) -> None:
        """Wait until the copy of a value has ended."""
        waited = max(0.0, self._ends[way, value] - self.now_seconds)
        self.waited_seconds += waited
        self.now_seconds += waited
