"""Who still needs what: living handles, and calls that may have to be made again for them."""

from __future__ import annotations

from collections.abc import Iterator

from autoremat.engines.torch.eager.ledger import Ledger


class Needs:
    """Counts, for every call and for every value that no call makes again, the reasons to keep it.

    A handle is a reason for the call that makes its value, or for the value itself; a call that is needed is one for
    whatever makes what it reads. Each change takes time linear in what becomes needed, or unneeded, by it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._reasons: dict[int, int] | None = None
        """By call, or by ``~value``; None as long as nobody has asked for a count: a plan knows without."""
        self.handles: dict[int, int] = {}
        """For every value the number of living handles."""

    def add_handle(self, value: int) -> None:
        """A handle stands for this value now."""
        self.handles[value] = self.handles.get(value, 0) + 1
        if self._reasons is not None:
            self._add(self._reasons, self._key(value))

    def remove_handle(self, value: int) -> Iterator[int]:
        """A handle is gone; gives the values that nothing needs any more."""
        left = self.handles[value] - 1
        if left:
            self.handles[value] = left
        else:
            del self.handles[value]
        if self._reasons is not None:
            yield from self._remove(self._reasons, self._key(value))
        if not left:
            yield value

    def move_handles(self, old: int, new: int) -> None:
        """The handles of a value stand for the one that its memory holds now."""
        n = self.handles.pop(old, 0)
        for _ in range(n):
            self.add_handle(new)
        if n and self._reasons is not None:
            self.count()

    def is_needed(self, value: int) -> bool:
        """Whether a handle stands for the value, or for something that would be made from it and cannot be without."""
        if value in self.handles:
            return True
        return value not in self._ledger.maker and (self._reasons is None or self._reasons.get(~value, 0) > 0)

    def count(self) -> None:
        """Count from now on; anew, after entries have come or gone."""
        self._reasons = {}
        for value, n in self.handles.items():
            for _ in range(n):
                self._add(self._reasons, self._key(value))

    def stop_counting(self) -> None:
        """Nobody will ask any more."""
        self._reasons = None

    def _key(self, value: int) -> int:
        call = self._ledger.maker.get(value)
        return ~value if call is None else call

    def _add(self, reasons: dict[int, int], key: int) -> None:
        pending = [key]
        while pending:
            key = pending.pop()
            n = reasons[key] = reasons.get(key, 0) + 1
            if n == 1 and key >= 0:
                pending += [self._key(v) for v in self._ledger.entries[key].reads]

    def _remove(self, reasons: dict[int, int], key: int) -> Iterator[int]:
        """Take a reason away; gives the values without a maker that nothing needs any more."""
        pending = [key]
        while pending:
            key = pending.pop()
            n = reasons[key] = reasons[key] - 1
            if n:
                continue
            if key >= 0:
                pending += [self._key(v) for v in self._ledger.entries[key].reads]
            else:
                yield ~key
