"""Tiers that copy when it is worst, and spoil what nobody may look at any more, or not yet."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

from autoremat.engines.numpy.tier import Array

POISON = 0xFB
"""Every byte of what has left, and of what has not arrived."""


def spoil(array: Array) -> None:
    """Fill an array with what no result is."""
    array.view(np.uint8)[...] = POISON


class Late:
    """Copies when it is waited for, not before; and spoils the source then, and the target until then."""

    def __init__(self) -> None:
        self.sources: dict[str, Array] = {}
        self.targets: dict[str, Array] = {}
        self.copies: dict[str, bytes] = {}
        self.copied = 0

    def send(self, name: str, array: Array) -> None:
        assert name not in self.sources
        assert name not in self.copies
        self.sources[name] = array

    def sent(self, name: str) -> None:
        self.out(name)
        spoil(self.sources.pop(name))

    def fetch(self, name: str, array: Array) -> None:
        spoil(array)
        self.targets[name] = array

    def fetched(self, name: str) -> None:
        self.back(name)
        del self.targets[name], self.copies[name]

    def out(self, name: str) -> None:
        """Copy to the tier, unless that has been done."""
        if name not in self.copies:
            self.copies[name] = self.sources[name].tobytes()
            self.copied += len(self.copies[name])

    def back(self, name: str) -> None:
        """Copy back."""
        target = self.targets[name]
        target[...] = np.frombuffer(self.copies[name], target.dtype).reshape(target.shape)


class AtOnceAndSpoiled(Late):
    """Copies at once; spoils as well."""

    def send(self, name: str, array: Array) -> None:
        super().send(name, array)
        self.out(name)

    def fetch(self, name: str, array: Array) -> None:
        super().fetch(name, array)
        self.back(name)


class AtRandom(Late):
    """Copies some of what waits, in any order, whenever anything happens."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._dice = random.Random(seed)

    def happens(self) -> None:
        """Copy something, or nothing."""
        waiting = [(self.out, n) for n in self.sources] + [(self.back, n) for n in self.targets]
        self._dice.shuffle(waiting)
        for copy, name in waiting[: self._dice.randint(0, len(waiting))]:
            copy(name)

    def send(self, name: str, array: Array) -> None:
        super().send(name, array)
        self.happens()

    def fetch(self, name: str, array: Array) -> None:
        super().fetch(name, array)
        self.happens()


class AsTold(Late):
    """Copies ahead of the runs that it is told: of every copy the number of the call before which it happens."""

    def __init__(self, moments: Mapping[tuple[str, str], int]) -> None:
        super().__init__()
        self._moments = moments
        self.now = -1

    def tick(self) -> None:
        """A call begins."""
        self.now += 1
        for name in list(self.sources):
            if self._moments["out", name] == self.now:
                self.out(name)
        for name in list(self.targets):
            if self._moments["in", name] == self.now:
                self.back(name)


def all_orders(copies: Sequence[tuple[tuple[str, str], range]]) -> list[dict[tuple[str, str], int]]:
    """Every way for copies to happen at one of their moments each."""
    found: list[dict[tuple[str, str], int]] = [{}]
    for key, moments in copies:
        found = [{**known, key: moment} for known in found for moment in moments]
    return found
