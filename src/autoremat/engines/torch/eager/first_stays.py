"""First stays: how long kept values stay after a noted forward.

A plan may keep a value for some of those who ask for it, drop it, and recompute it for others. Where a forward follows
the plan, autograd has the value for the former, and frees it with the last of them. In a noted one all have handles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from autoremat.engines.torch.eager.script import Script


class FirstStays:
    """Knows which values have handles left that the plan keeps them for.

    Attributes:
        late: values to drop as soon as the last of these is gone.
    """

    def __init__(self) -> None:
        self.late: set[int] = set()
        self._packed: tuple[int | None, ...] = ()
        self._left: Counter[int] = Counter()
        """By value, handles for which the plan keeps it."""
        self._gone_early: list[int] = []
        """Packs that were gone before there was a plan."""

    def take_plan(self, script: Script) -> None:
        """Begin to count, by a plan made of this forward."""
        kept = [packed is None for packed in script.packs]
        self._packed = tuple(v if k and v in script.kept else None for k, v in zip(kept, script.packed, strict=False))
        self._left = Counter(v for v in self._packed if v is not None)
        self.gone(self._gone_early)
        self._gone_early = []

    def gone(self, packs: Iterable[int]) -> list[int]:
        """Uncount handles that are gone; return values without any left."""
        if not self._packed:
            self._gone_early += packs
            return []
        over = []
        for pack in packs:
            value = self._packed[pack] if pack < len(self._packed) else None
            if value is None:
                continue
            self._left[value] -= 1
            if not self._left[value]:
                over.append(value)
        return over

    def last(self, value: int) -> bool:
        """Tell whether the plan still keeps the value for a handle."""
        return self._left[value] > 0
