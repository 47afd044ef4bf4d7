"""The planner's clock: work is counted, and time is a limit.

Which plan is found must not depend on how busy a machine is. So all that takes long says what it has done (``spend``),
in seconds of a nominal machine, and ends where its share of the *effort* is spent (``is_over``). Real time only cuts:
once the limit of ``limited`` has passed, everything is over.

In one place, so that tests can put their own clock in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf

_LOOK_WORK, _LOOK_CALLS = 0.02, 50
"""After how much work, or how many questions, real time is looked at again."""


class _Meter(threading.local):
    """The clock of one thread: its work, its end.

    It has the work so far, when time is over, and whether that has ended something.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.end = inf
        self.has_cut = False
        self.next_look, self.calls = 0.0, 0

    def look(self) -> None:
        """Look at real time, now and then."""
        self.calls += 1
        if self.seconds >= self.next_look or self.calls >= _LOOK_CALLS:
            self.next_look, self.calls = self.seconds + _LOOK_WORK, 0
            self.has_cut |= now() > self.end


_METER = _Meter()


def now() -> float:
    """Read the seconds of ``time.monotonic``."""
    return time.monotonic()


def worked() -> float:
    """Return this thread's work in seconds of a nominal machine."""
    return _METER.seconds


def spend(seconds: float) -> None:
    """Say that so much work has been done."""
    _METER.seconds += seconds


def is_over(deadline: float = inf, *, closely: bool = False) -> bool:
    """Tell whether the work has reached ``deadline``, or time is over.

    ``closely``: as of right now.
    """
    if closely:
        _METER.next_look = 0.0
    if not _METER.has_cut:
        _METER.look()
    return _METER.has_cut or _METER.seconds > deadline


def has_cut() -> bool:
    """Tell whether the time limit has ended something too early."""
    return _METER.has_cut


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Set a limit in real seconds for the block.

    Then everything is over; an outer limit stays.

    Example:
        >>> with limited(60.0):
        ...     is_over()
        False
    """
    end, had_cut = _METER.end, _METER.has_cut
    _METER.end, _METER.has_cut, _METER.next_look = min(end, now() + seconds), False, 0.0
    try:
        yield
    finally:
        _METER.end, _METER.has_cut = end, had_cut


@contextmanager
def aside() -> Iterator[None]:
    """Within it, work counts nowhere, and no limit cuts it."""
    known = _METER.seconds, _METER.end, _METER.has_cut
    _METER.end, _METER.has_cut = inf, False
    try:
        yield
    finally:
        _METER.seconds, _METER.end, _METER.has_cut = known


def left() -> float:
    """Real seconds up to the limit of time."""
    return max(0.0, _METER.end - now())


def relaxation_limits(seconds: float) -> Mapping[str, float]:
    """Limit the time of a linear program (HiGHS)."""
    return {"time_limit": max(0.1, seconds)}


def search_limits(seconds: float) -> Mapping[str, float]:
    """Limit the time of an integer program (HiGHS)."""
    return {"time_limit": max(0.1, seconds)}
