"""Needs: living handles, and the calls that must stay rerunnable for them."""

from __future__ import annotations

from collections.abc import Iterator

from autoremat.engines.torch.eager.ledger import Ledger


class Needs:
    """Counts the reasons to keep every call, and every irreplaceable value.

    A handle is a reason to keep the call that makes its value, or, if there is no such call, the value itself. A call
    that is needed is a reason to keep whatever makes what it reads. Each change takes time linear in what becomes
    needed, or unneeded.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._reasons: dict[int, int] | None = None
        """By call, or by ``~value``; None until a count is wanted.

        A plan does without.
        """
        self.handles: dict[int, int] = {}
        """By value, the number of living handles."""
        self.n_handles = 0
        """How many there are of all values."""

    def add_handle(self, value: int) -> None:
        """Count a handle that stands for this value now."""
        self.handles[value] = self.handles.get(value, 0) + 1
        self.n_handles += 1
        if self._reasons is not None:
            self._add(self._reasons, self._key(value))

    def remove_handle(self, value: int) -> Iterator[int]:
        """Uncount a handle that is gone; yield values no longer needed."""
        left = self.handles[value] - 1
        self.n_handles -= 1
        if left:
            self.handles[value] = left
        else:
            del self.handles[value]
        if self._reasons is not None:
            yield from self._remove(self._reasons, self._key(value))
        if not left:
            yield value

    def move_handles(self, old: int, new: int) -> None:
        """Let a value's handles stand for what its memory holds now."""
        n = self.handles.pop(old, 0)
        self.n_handles -= n
        for _ in range(n):
            self.add_handle(new)
        if n and self._reasons is not None:
            self.count()

    def is_needed(self, value: int) -> bool:
        """Tell whether a handle needs this value.

        It does if it stands for the value, or for one that cannot be recomputed without it.
        """
        if value in self.handles:
            return True
        return value not in self._ledger.maker and (self._reasons is None or self._reasons.get(~value, 0) > 0)

    def count(self) -> None:
        """Begin to count, or count afresh after entries came or went."""
        self._reasons = {}
        for value, n in self.handles.items():
            for _ in range(n):
                self._add(self._reasons, self._key(value))

    def stop_counting(self) -> None:
        """Stop counting: nobody will ask any more."""
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
        """Take a reason away; yield irreplaceable values no longer needed."""
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
