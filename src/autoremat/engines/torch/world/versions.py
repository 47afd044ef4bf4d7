"""The versions of torch that autoremat is tested with."""

from __future__ import annotations

import re
import warnings
from typing import Final

TESTED: Final = "2.11", "2.15"
"""The oldest and the newest tested version.

``make versions`` runs the everyday tests with both of them and with some in between.
"""


def warn_if_untested(version: str) -> None:
    """Warn if this version of torch is newer than the tested ones."""
    oldest, newest = TESTED
    if _release(version) > _release(newest):
        warnings.warn(
            f"autoremat is tested with torch {oldest} to {newest}, this is {version}: it relies on parts of torch that "
            "may have changed since. autoremat.check compares a step of yours with plain training, bit by bit",
            RuntimeWarning,
            stacklevel=2,
        )


def _release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)
