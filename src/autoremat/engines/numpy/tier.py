"""``Tier``: keeps the arrays that the reference engine moves out of memory.

From there it fetches them back.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]


class Tier(Protocol):
    """Keeps copies of arrays, by name.

    When it copies is its own affair, between two calls of a name.

    The engine frees an array once ``sent`` has returned, and lets nobody read one before ``fetched`` has.
    """

    def send(self, name: str, array: Array) -> None:
        """Begin to copy an array to the tier."""

    def sent(self, name: str) -> None:
        """Wait for that copy's end; refer to the array no longer."""

    def fetch(self, name: str, array: Array) -> None:
        """Begin to copy it back into this array, which holds anything."""

    def fetched(self, name: str) -> None:
        """Wait for the end of that copy, and forget the name."""


class AtOnce:
    """A tier that copies whenever it is told to begin."""

    def __init__(self) -> None:
        self._copies: dict[str, bytes] = {}

    def send(self, name: str, array: Array) -> None:
        """Copy the bytes."""
        self._copies[name] = array.tobytes()

    def sent(self, name: str) -> None:
        """There is nothing to wait for."""

    def fetch(self, name: str, array: Array) -> None:
        """Copy the bytes back."""
        array[...] = np.frombuffer(self._copies[name], array.dtype).reshape(array.shape)

    def fetched(self, name: str) -> None:
        """Forget the copy."""
        del self._copies[name]
