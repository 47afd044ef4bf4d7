"""Parts of a tier for one step, in memory, that copy when it is worst; and a tier that opens them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from autoremat.program import Link

POISON = 0xFB
"""Every byte of what has not come back yet."""


class Copy:
    """One copy, made when its store wants to."""

    def __init__(self, source: Any, target: torch.UntypedStorage | None) -> None:
        self.source, self.target = source, target
        self.bytes: torch.UntypedStorage | None = None
        self.is_done = False

    def make(self) -> None:
        if self.is_done:
            return
        self.is_done = True
        if self.target is None:
            self.bytes = self.source.clone()
        else:
            self.target.copy_(self.source.bytes)


class Late:
    """Copies when it is waited for, not before."""

    def __init__(self, fails: Callable[[str, int], BaseException | None] = lambda way, n: None) -> None:
        self.copies: list[Copy] = []
        self.moved = self.n_out = self.n_back = 0
        self.is_closed = False
        self._fails = fails

    def has_room(self, nbytes: int) -> bool:
        return True

    def send(self, storage: torch.UntypedStorage) -> Copy:
        self.copies.append(Copy(storage, None))
        return self.copies[-1]

    def fetch(self, sent: Copy, storage: torch.UntypedStorage) -> Copy:
        assert sent.bytes is not None, "it comes back before it has gone"
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(POISON)
        self.copies.append(Copy(sent, storage))
        return self.copies[-1]

    def wait(self, copy: Copy) -> BaseException | None:
        copy.make()
        is_out = copy.target is None
        self.n_out, self.n_back = self.n_out + is_out, self.n_back + (not is_out)
        self.moved += not is_out
        return self._fails("out", self.n_out) if is_out else self._fails("in", self.n_back)

    def close(self) -> None:
        self.copies.clear()
        self.is_closed = True


class AtOnce(Late):
    """Copies when it is told to."""

    def send(self, storage: torch.UntypedStorage) -> Copy:
        copy = super().send(storage)
        copy.make()
        return copy

    def fetch(self, sent: Copy, storage: torch.UntypedStorage) -> Copy:
        copy = super().fetch(sent, storage)
        copy.make()
        return copy


class AtRandom(Late):
    """Copies some of what waits whenever anything happens, in any order."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._dice = random.Random(seed)

    def _happens(self) -> None:
        waiting = [copy for copy in self.copies if not copy.is_done]
        self._dice.shuffle(waiting)
        for copy in waiting[: self._dice.randint(0, len(waiting))]:
            copy.make()

    def send(self, storage: torch.UntypedStorage) -> Copy:
        copy = super().send(storage)
        self._happens()
        return copy

    def fetch(self, sent: Copy, storage: torch.UntypedStorage) -> Copy:
        copy = super().fetch(sent, storage)
        self._happens()
        return copy


class TierOfStores:
    """A tier of such stores, in place of the user's."""

    def __init__(self, make: Callable[[], Late]) -> None:
        self.name, self._make = "a test", make
        self.stores: list[Late] = []

    def link(self) -> Link:
        return Link(1e9, 1e9)

    def open(self, nbytes: int) -> Late:
        self.stores.append(self._make())
        return self.stores[-1]
