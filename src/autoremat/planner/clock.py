"""The planner's clock: every limit of time is a point on it.

In one place, so that tests can count work in place of seconds: then a plan does not depend on how busy a machine is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping


def now() -> float:
    """Seconds, as ``time.monotonic`` has them."""
    return time.monotonic()


def relaxation_limits(seconds: float) -> Mapping[str, float]:
    """The limits of a linear program (HiGHS) that may take so long."""
    return {"time_limit": max(0.1, seconds)}


def search_limits(seconds: float) -> Mapping[str, float]:
    """The limits of an integer program (HiGHS) that may take so long."""
    return {"time_limit": max(0.1, seconds)}
