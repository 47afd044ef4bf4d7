"""Retention intervals: what is in memory when, as further runs come and go one at a time.

A value stays from the run that makes it to the last run that reads that copy, and is there again from a further run on.
So a set of further runs says when every value is in memory (the retention intervals of Bartan et al. 2023, "Moccasin:
Efficient Tensor Rematerialization for Neural Networks"), and every such set is a schedule: a value that runs again
early shortens the interval before it, what it reads lasts longer. Adding or removing one run changes the intervals of
what it reads and writes and nothing else. ``Retention`` keeps the bytes at every run exact under such changes.

The key of run ``(late, op)``, op ``op`` right ahead of the first run of op ``late``, is ``late * n + op``; that of the
first run of an op is ``op * n + op``. Runs are in the order of their keys, as in ``unroll.merge``.
"""

from __future__ import annotations

from bisect import bisect_left
from copy import copy
from dataclasses import dataclass

import numpy as np

from autoremat.planner.search.account import Ints
from autoremat.program import Program

Runs = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Facts:
    """What no further run can change. Sequences are indexed by op or by value.

    Attributes:
        reads: for every op the values read that are not fixed.
        writes: for every op the values written.
        nbytes: of every value.
        producer: of every value, -1 where no op makes it.
        seconds: of a further run of every op.
        first_bytes: what the first run of an op adds while it runs, to what was there and stays.
        again_bytes: the same of a further run.
        after: for every op the op beyond which it may run again; no op at all: the number of ops.
    """

    reads: tuple[tuple[int, ...], ...]
    writes: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    producer: tuple[int, ...]
    seconds: tuple[float, ...]
    first_bytes: tuple[int, ...]
    again_bytes: tuple[int, ...]
    after: tuple[int, ...]


def facts_of(program: Program) -> Facts:
    """The facts of a program. O(reads).

    What an in-place op overwrites is not made again here, nor is what reads it or comes of it.
    """
    ops, values = program.ops, program.values
    lost = {old for op in ops for _, old in op.in_place}
    written = [sum(values[v].nbytes for v in op.writes) for op in ops]
    taken = [sum(min(values[new].nbytes, values[old].nbytes) for new, old in op.in_place) for op in ops]
    after = []
    for i, op in enumerate(ops):
        fits = op.once is None and op.writes and not op.in_place and lost.isdisjoint((*op.reads, *op.writes))
        after.append(max([i, *(program.hold[v] for v in op.writes)]) if fits else len(ops))
    return Facts(
        tuple(tuple(v for v in op.reads if not values[v].fixed) for op in ops),
        tuple(op.writes for op in ops),
        tuple(v.nbytes for v in values),
        program.producer,
        tuple(op.again_seconds for op in ops),
        tuple(w + op.scratch_bytes - t for w, op, t in zip(written, ops, taken, strict=True)),
        tuple(w + op.again_scratch_bytes for w, op in zip(written, ops, strict=True)),
        tuple(after),
    )


class Retention:
    """The runs of a schedule and the bytes at each of them, under changes.

    Args:
        program: whose ops run; at first each of them once.
        budget_bytes: what ``over`` counts from.

    Attributes:
        budget_bytes: the same.
        facts: of the program.
        n: how many ops there are.
        keys: of all runs, ascending.
        accesses: for every value the keys of the runs that make or read it, ascending; up to where it is held, too.
        count: of the further runs.
        extra_seconds: of the further runs.
    """

    def __init__(self, program: Program, budget_bytes: int = 0) -> None:
        self.facts, self.budget_bytes = facts_of(program), budget_bytes
        self.n = n = len(program.ops)
        self.keys = [i * (n + 1) for i in range(n)]
        self.accesses: list[list[int]] = [_accesses(program, v) for v in range(len(program.values))]
        self.count, self.extra_seconds = 0, 0.0
        self._over = np.zeros(2 * n + 1, dtype=np.int64)
        self._over[:n] = program.fixed_bytes - budget_bytes + np.array(self.facts.first_bytes, dtype=np.int64)
        for v, found in enumerate(self.accesses):
            if found:  # what an op writes is in its own bytes
                self._over[found[0] // n + 1 : found[-1] // n + 1] += self.facts.nbytes[v]

    def with_runs(self, runs: Runs, budget_bytes: int) -> Retention:
        """The same with these further runs as well, and counted from a budget; this one stays as it is."""
        other = copy(self)
        other.keys, other.accesses = list(self.keys), [list(found) for found in self.accesses]
        other._over = self._over + (self.budget_bytes - budget_bytes)
        other.budget_bytes = budget_bytes
        for late, op in sorted(set(runs)):
            other.add(late * self.n + op)
        return other

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any run."""
        return int(self.over.max(initial=-self.budget_bytes)) + self.budget_bytes

    @property
    def over(self) -> Ints:
        """For every run the bytes above the budget, negative where there is room; a view."""
        return self._over[: len(self.keys)]

    @property
    def excess_bytes(self) -> int:
        """The bytes above the budget, of all runs together. O(runs)."""
        return int(np.maximum(self.over, 0).sum())

    @property
    def again(self) -> tuple[int, ...]:
        """The keys of the further runs, ascending."""
        return tuple(k for k in self.keys if self.is_again(k))

    @property
    def runs(self) -> Runs:
        """The further runs as ``(late op, op)``."""
        return [divmod(k, self.n) for k in self.again]

    def is_again(self, key: int) -> bool:
        """Whether the run of that key would be a further one."""
        return key // self.n != key % self.n

    def add(self, key: int) -> None:
        """Have one more further run, which is not there yet. O(values it uses * runs) array operations."""
        facts, keys, i = self.facts, self.keys, key % self.n
        if len(keys) + 1 == len(self._over):
            self._over = np.concatenate([self._over, np.zeros_like(self._over)])
        x, over = bisect_left(keys, key), self._over
        over[x + 1 : len(keys) + 1] = over[x : len(keys)]
        over[x] += facts.again_bytes[i] - self._own_bytes(keys[x])
        keys.insert(x, key)
        for v in facts.reads[i]:
            begin = self._enter(v, key, is_read=True)
            if begin >= 0:
                over[begin + 1 : x + 1] += facts.nbytes[v]
        for v in facts.writes[i]:
            begin = self._enter(v, key, is_read=False)
            if begin >= 0:
                over[begin + 1 : x + 1] -= facts.nbytes[v]
        self.count += 1
        self.extra_seconds += facts.seconds[i]

    def remove(self, key: int) -> None:
        """Take a further run back. O(values it uses * runs) array operations."""
        facts, keys, over, i = self.facts, self.keys, self._over, key % self.n
        x = bisect_left(keys, key)
        for v in facts.writes[i]:
            begin = self._leave(v, key, is_read=False)
            if begin >= 0:
                over[begin + 1 : x + 1] += facts.nbytes[v]
        for v in facts.reads[i]:
            begin = self._leave(v, key, is_read=True)
            if begin >= 0:
                over[begin + 1 : x + 1] -= facts.nbytes[v]
        over[x : len(keys) - 1] = over[x + 1 : len(keys)]
        del keys[x]
        self.count -= 1
        self.extra_seconds -= facts.seconds[i]

    def lasts(self, value: int, key: int) -> bool:
        """Whether a value that is in memory at that run is read later than it, as the same copy. O(log accesses)."""
        found = self.accesses[value]
        p = bisect_left(found, key + 1)
        return p < len(found) and found[p] % self.n != self.facts.producer[value]

    def _own_bytes(self, key: int) -> int:
        """What a run adds while it runs, to what was there and stays."""
        i = key % self.n
        return self.facts.again_bytes[i] if self.is_again(key) else self.facts.first_bytes[i]

    def _enter(self, value: int, key: int, *, is_read: bool) -> int:
        """Note an access; the run before it between which and this one the value comes, or goes; -1 if neither."""
        found = self.accesses[value]
        p = bisect_left(found, key)
        begin = self._changed_from(value, p, is_read=is_read)
        found.insert(p, key)
        return begin

    def _leave(self, value: int, key: int, *, is_read: bool) -> int:
        """The opposite of ``_enter``."""
        found = self.accesses[value]
        p = bisect_left(found, key)
        del found[p]
        return self._changed_from(value, p, is_read=is_read)

    def _changed_from(self, value: int, p: int, *, is_read: bool) -> int:
        """Where the interval begins that an access between ``p - 1`` and ``p`` changes; -1: none does."""
        found = self.accesses[value]
        lasts = p < len(found) and found[p] % self.n != self.facts.producer[value]
        return -1 if lasts == is_read else bisect_left(self.keys, found[p - 1])


def _accesses(program: Program, value: int) -> list[int]:
    n, made_by, hold = len(program.ops), program.producer[value], program.hold[value]
    if program.values[value].fixed or made_by < 0:
        return []
    return sorted({i * (n + 1) for i in (made_by, *program.readers[value], *([hold] if hold >= made_by else []))})
