"""Bytes of an order of runs, fast: what ``Schedule.from_order`` and ``simulate`` say, on arrays.

A planner asks "what is the peak of this order?" hundreds of times. ``Accountant`` lays the program out in arrays once
and then answers in O(accesses) array operations, without making a schedule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from autoremat.program import Program

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Account:
    """The bytes of one order of runs.

    Attributes:
        order: op index of every run.
        during: bytes in memory while each run happens.
        value, start, end: one entry per residency of a value that is not fixed: from run ``start`` to run ``end``
            inclusive, sorted by value, then by start.
        first_access: for every residency the index of its first entry in ``access``.
        access: runs that read or write the value, of all residencies one after the other.
        extra_seconds: duration of the reruns alone.
    """

    order: Ints
    during: Ints
    value: Ints
    start: Ints
    end: Ints
    first_access: Ints
    access: Ints
    extra_seconds: float

    @cached_property
    def peak_bytes(self) -> int:
        """The most bytes at any run."""
        return int(self.during.max(initial=0))

    @cached_property
    def peak_run(self) -> int:
        """The first run at which the peak stands."""
        return int(self.during.argmax())

    @cached_property
    def progress(self) -> Ints:
        """For every run the last op of the program that has run for the first time by then."""
        return np.maximum.accumulate(self.order)

    @cached_property
    def _keys(self) -> list[int]:
        return list((self.value * len(self.order) + self.start).tolist())

    @cached_property
    def _ends(self) -> list[int]:
        return list(self.end.tolist())

    def resident(self, value: int, run: int) -> bool:
        """Whether the value is in memory during the run. O(log residencies)."""
        n = len(self.order)
        k = bisect_right(self._keys, value * n + run) - 1
        return k >= 0 and self._keys[k] >= value * n and self._ends[k] >= run


class Accountant:
    """Arrays of one program, made once; call it with orders. O(accesses) each."""

    def __init__(self, program: Program) -> None:
        fixed = [v.fixed for v in program.values]
        access = [[v for v in dict.fromkeys(op.reads) if not fixed[v]] + list(op.writes) for op in program.ops]
        n_writes = [len(op.writes) for op in program.ops]
        self.n_ops = self.n_ordered = len(program.ops)
        self.fixed_bytes = program.fixed_bytes
        self.nbytes = np.array([v.nbytes for v in program.values], dtype=np.int64)
        self.scratch = np.array([op.scratch_bytes for op in program.ops], dtype=np.int64)
        self.again_scratch = np.array([op.again_scratch_bytes for op in program.ops], dtype=np.int64)
        self._scratch_differs = bool((self.scratch != self.again_scratch).any())
        self.seconds = np.array([op.again_seconds for op in program.ops], dtype=np.float64)
        self.hold = np.array(program.hold, dtype=np.int64)
        self._handed_until = np.array(program.handed_until, dtype=np.int64)
        self._count = np.array([len(a) for a in access], dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(self._count)])[:-1].astype(np.int64)
        # Radix sort is what numpy does on 16 bits, several times faster than on more.
        self._kind: Any = np.uint16 if len(program.values) < 1 << 16 else np.int64
        self._value = np.array([v for a in access for v in a], dtype=self._kind)
        self._written = np.array(
            [k >= len(a) - n for a, n in zip(access, n_writes, strict=True) for k in range(len(a))], dtype=bool
        )
        self._in_place = {i: op.in_place for i, op in enumerate(program.ops) if op.in_place}
        self._is_in_place = np.zeros(self.n_ops, dtype=bool)
        self._is_in_place[list(self._in_place)] = True

    def order(self, reruns: Sequence[tuple[int, int]]) -> Ints:
        """The order with the reruns ``(late op, op)`` placed in it, like ``unroll.merge``."""
        n = self.n_ordered
        base = np.arange(n, dtype=np.int64)
        if not reruns:
            return base
        extra = np.unique(np.array(reruns, dtype=np.int64), axis=0)
        key = np.concatenate([base * 2 * n + n, extra[:, 0] * 2 * n + extra[:, 1]])
        return np.concatenate([base, extra[:, 1]])[np.argsort(key)]

    def __call__(self, order: Ints) -> Account:
        """Bytes and residencies of the order."""
        value, run, written = self._accesses(order)
        first = np.flatnonzero(written)
        start, last = run[first], run[np.append(first, len(run))[1:] - 1]
        owner = value[first]
        end = prolonged(owner, last, start, self.held_until(order, value, run, first))
        m = len(order)
        nbytes = self.nbytes[owner].astype(np.float64)
        steps = np.bincount(start, nbytes, m + 1) - np.bincount(end + 1, nbytes, m + 1)
        during = np.cumsum(steps[:m]).astype(np.int64) + self._scratch_of(order) + self.fixed_bytes
        self._take_over(order, during, owner, end)
        return Account(order, during, owner, start, end, first, run, self._extra_seconds(order))

    def with_byproducts(self, order: Ints) -> Account:
        """The same, with the copies that nothing reads but that could be kept."""
        return self(order)

    def extra_seconds_of(self, order: Ints) -> float:
        """Seconds of the reruns of an order."""
        return self._extra_seconds(order)

    def _extra_seconds(self, order: Ints) -> float:
        return float(np.dot(np.bincount(order, minlength=self.n_ops) - 1, self.seconds))

    def _scratch_of(self, order: Ints) -> Ints:
        """Temporary bytes of every run."""
        if not self._scratch_differs:
            return self.scratch[order]
        return np.where(self._are_again(order), self.again_scratch[order], self.scratch[order])

    def _are_again(self, order: Ints) -> npt.NDArray[np.bool_]:
        """For every run whether the op has run before."""
        again = np.ones(len(order), dtype=bool)
        again[np.unique(order, return_index=True)[1]] = False
        return again

    def _accesses(self, order: Ints) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """Value and run of every access, sorted by value then run, and whether it writes: a residency begins there."""
        count = self._count[order]
        ends = np.cumsum(count)
        flat = np.arange(ends[-1] if len(ends) else 0) + np.repeat(self._first[order] - (ends - count), count)
        value = self._value[flat]
        by_value = np.argsort(value, kind="stable")
        run = np.repeat(np.arange(len(order)), count)[by_value]
        return value[by_value].astype(np.int64), run, self._written[flat][by_value]

    def held_until(self, order: Ints, value: Ints, run: Ints, first: Ints) -> Ints:
        """For every residency the run until which something holds its value, lately the backward, which was handed it.

        ``value`` and ``run`` are those of the accesses, ``first`` the accesses with which residencies begin.
        """
        owner, hold = value[first], self.hold[value[first]]
        first_run = np.full(self.n_ops, -1, dtype=np.int64)
        first_run[order[::-1]] = np.arange(len(order))[::-1]
        until: Ints = np.where(hold >= 0, first_run[hold], -1)
        handed = self._handed_until[order[run]]
        asks = np.flatnonzero(handed >= 0)
        if len(asks):
            latest = np.searchsorted(asks, np.append(first, len(run))[1:]) - 1
            ask = asks[np.maximum(latest, 0)]
            is_asked = (latest >= 0) & (value[ask] == owner)
            until = np.maximum(until, np.where(is_asked, first_run[handed[ask]], -1))
        return until

    def _take_over(self, order: Ints, during: Ints, owner: Ints, end: Ints) -> None:
        """In-place ops whose input leaves with the run need no second storage."""
        runs = np.flatnonzero(self._is_in_place[order])
        if not len(runs):
            return
        m = len(order)
        leaves = set((owner * m + end).tolist())
        for run in runs.tolist():
            pairs = self._in_place[int(order[run])]
            taken = [(new, old) for new, old in pairs if old * m + run in leaves]
            during[run] -= sum(int(min(self.nbytes[new], self.nbytes[old])) for new, old in taken)


def prolonged(owner: Ints, last: Ints, twice: Ints, held_until: Ints) -> Ints:
    """The last run of every residency: that of its last access, later where the value is held.

    ``twice`` is for every residency the last run at which the copy before it is there as well.
    """
    end = np.maximum(last, held_until)
    again = np.flatnonzero(owner[1:] == owner[:-1])
    end[again] = np.minimum(end[again], np.maximum(twice[again + 1], last[again]))
    return end
