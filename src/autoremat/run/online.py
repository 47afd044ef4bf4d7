"""The online policy: what to let go of when a step has left the path that its plan is for.

After DTR (Kirisame et al. 2021, "Dynamic Tensor Rematerialization", ICLR, section 4.1): the value with the least cost
per byte and staleness goes first; its cost is its op's and that of all ops that would have to run again with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

_MOST_LOOKED_AT = 64
"""Ops that the cost of one value takes into account."""


class Online:
    """The heuristic of DTR on what the tape tells it.

    Args:
        budget_bytes: what the whole step may take.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._clock = 0
        self._used: dict[int, int] = {}
        self._seconds: dict[int, float] = {}
        self._reads: dict[int, Sequence[int]] = {}

    def ran(self, op: int, seconds: float, reads: Sequence[int], writes: Iterable[int]) -> None:
        """Take note of an op that could run again."""
        self._seconds[op], self._reads[op] = seconds, reads
        self.used(*reads, *writes)

    def used(self, *values: int) -> None:
        """Take note of values that are needed now."""
        self._clock += 1
        self._used.update(dict.fromkeys(values, self._clock))

    def pick(self, sizes: Mapping[int, int], maker: Mapping[int, int], held: Mapping[int, object]) -> int:
        """The value to let go of: the least cost / (bytes * staleness).

        Args:
            sizes: bytes of every value that may go.
            maker: the op that makes a value again.
            held: the values in memory.
        """
        return min(sizes, key=lambda n: (self._cost(n, maker, held) / (sizes[n] * self._staleness(n)), n))

    def _staleness(self, value: int) -> int:
        return 1 + self._clock - self._used.get(value, 0)

    def _cost(self, value: int, maker: Mapping[int, int], held: Mapping[int, object]) -> float:
        seconds, seen, stack = 0.0, set[int](), [maker[value]]
        while stack and len(seen) < _MOST_LOOKED_AT:
            op = stack.pop()
            if op not in seen:
                seen.add(op)
                seconds += self._seconds.get(op, 0.0)
                stack += [maker[n] for n in self._reads.get(op, ()) if n not in held and n in maker]
        return seconds
