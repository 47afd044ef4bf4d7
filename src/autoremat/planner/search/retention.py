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

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field

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

    def own_bytes(self, key: int) -> int:
        """What a run adds while it runs, to what was there and stays."""
        late, i = divmod(key, len(self.reads))
        return self.first_bytes[i] if late == i else self.again_bytes[i]


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


class Bag:
    """Keys in no order, any of which is drawn, added or removed in the same time.

    Attributes:
        keys: a list that only this class changes.
    """

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self.keys = list(keys)
        self._place = {key: k for k, key in enumerate(self.keys)}

    def add(self, key: int) -> None:
        """Add a key that is not there."""
        self._place[key] = len(self.keys)
        self.keys.append(key)

    def remove(self, key: int) -> None:
        """Remove a key that is there; the last one takes its place."""
        place, last = self._place.pop(key), self.keys.pop()
        if last != key:
            self.keys[place] = last
            self._place[last] = place


@dataclass(slots=True)
class Draft:
    """A change that is not settled.

    Attributes:
        changes: keys of the further runs to add, ``~key`` of those to take back.
        spans: ``(a, b, bytes)``: what the runs after the one of key ``a`` get more, up to that of ``b`` and with it.
        seconds: that the further runs take more.
    """

    changes: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, change: int, seconds: float) -> None:
        """Take note of one more change, which may be the opposite of an earlier one."""
        if ~change in self.changes:
            self.changes.remove(~change)
        else:
            self.changes.append(change)
        self.seconds += seconds


class Retention:
    """The runs of a schedule and the bytes at each of them, under changes.

    A change is drafted first, run by run: what it would do to the bytes is known then, at little expense, and it is
    settled or taken back.

    Args:
        program: whose ops run; at first each of them once.
        budget_bytes: what ``over`` counts from.

    Attributes:
        budget_bytes: the same.
        facts: of the program.
        n: how many ops there are.
        keys: of all runs, ascending.
        again: keys of the further runs.
        accesses: for every value the keys of the runs that make or read it, ascending; up to where it is held, too;
            those of the draft among them.
        extra_seconds: of the further runs.
        draft: what is not settled yet.
    """

    def __init__(self, program: Program, budget_bytes: int = 0) -> None:
        self.facts, self.budget_bytes = facts_of(program), budget_bytes
        self.n = n = len(program.ops)
        self.keys = [i * (n + 1) for i in range(n)]
        self.again = Bag()
        self.accesses: list[list[int]] = [_accesses(program, v) for v in range(len(program.values))]
        self.extra_seconds, self.draft = 0.0, Draft()
        self._over = np.zeros(2 * n + 1, dtype=np.int64)
        self._over[:n] = program.fixed_bytes - budget_bytes + np.array(self.facts.first_bytes, dtype=np.int64)
        for v, found in enumerate(self.accesses):
            if found:  # what an op writes is in its own bytes
                self._over[found[0] // n + 1 : found[-1] // n + 1] += self.facts.nbytes[v]
        self._sums: list[int] = []
        """Of the bytes above the budget: for every run those at all runs before it, and in all; empty: not known."""
        self._above: list[int] | None = None

    def with_runs(self, runs: Runs, budget_bytes: int) -> Retention:
        """The same with these further runs as well, and counted from a budget; this one stays as it is."""
        other = copy(self)
        other.keys, other.accesses = list(self.keys), [list(found) for found in self.accesses]
        other.again, other.draft = Bag(self.again.keys), Draft()
        other._sums, other._above = [], None
        other._over = self._over + (self.budget_bytes - budget_bytes)
        other.budget_bytes = budget_bytes
        for late, op in sorted(set(runs)):
            other.add(late * self.n + op)
            other.settle()
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
        """The bytes above the budget, of all runs together."""
        return self._summed()[-1]

    @property
    def runs(self) -> Runs:
        """The further runs as ``(late op, op)``."""
        return [divmod(k, self.n) for k in sorted(self.again.keys)]

    def is_again(self, key: int) -> bool:
        """Whether the run of that key would be a further one."""
        return key // self.n != key % self.n

    def lasts(self, value: int, key: int) -> bool:
        """Whether a value that is in memory at that run is read later than it, as the same copy. O(log accesses)."""
        found = self.accesses[value]
        p = bisect_left(found, key + 1)
        return p < len(found) and found[p] % self.n != self.facts.producer[value]

    # -- a draft -------------------------------------------------------------------------------------------------------

    def add(self, key: int) -> None:
        """Draft one more further run, which is not there yet. O(values it uses * log runs)."""
        facts, n, i, spans = self.facts, self.n, key % self.n, self.draft.spans
        for v in facts.reads[i]:
            found = self.accesses[v]
            p = bisect_left(found, key)
            if p == len(found) or found[p] % n == facts.producer[v]:
                spans.append((found[p - 1], key, facts.nbytes[v]))
            found.insert(p, key)
        for v in facts.writes[i]:
            found = self.accesses[v]
            p = bisect_left(found, key)
            if p < len(found) and found[p] % n != facts.producer[v]:
                spans.append((found[p - 1], key, -facts.nbytes[v]))
            found.insert(p, key)
        self.draft.note(key, facts.seconds[i])

    def remove(self, key: int) -> None:
        """Draft to take a further run back. O(values it uses * log runs)."""
        facts, n, i, spans = self.facts, self.n, key % self.n, self.draft.spans
        for v in facts.writes[i]:
            found = self.accesses[v]
            p = bisect_left(found, key)
            del found[p]
            if p < len(found) and found[p] % n != facts.producer[v]:
                spans.append((found[p - 1], key, facts.nbytes[v]))
        for v in facts.reads[i]:
            found = self.accesses[v]
            p = bisect_left(found, key)
            del found[p]
            if p == len(found) or found[p] % n == facts.producer[v]:
                spans.append((found[p - 1], key, -facts.nbytes[v]))
        self.draft.note(~key, -facts.seconds[i])

    def take_back(self) -> None:
        """Forget the draft."""
        facts, n = self.facts, self.n
        for change in reversed(self.draft.changes):
            key = max(change, ~change)
            for v in (*facts.reads[key % n], *facts.writes[key % n]):
                found = self.accesses[v]
                p = bisect_left(found, key)
                if change >= 0:
                    del found[p]
                else:
                    found.insert(p, key)
        self.draft = Draft()

    def excess_change(self) -> int:
        """By how much the draft would change ``excess_bytes``. O(runs in its spans) in a few array operations."""
        keys, spans, sums = self.keys, self._spans(), self._summed()
        new, gone = self._new(), [bisect_left(keys, ~change) for change in self.draft.changes if change < 0]
        begin = min([*gone, *(a for a, _, _ in spans)], default=0)
        end = max([*(x + 1 for x in gone), *(b for _, b, _ in spans)], default=0)
        part = self._over[begin:end].copy()
        for a, b, nbytes in spans:
            part[a - begin : b - begin] += nbytes
        for x in gone:
            part[x - begin] = 0
        np.maximum(part, 0, out=part)
        return int(np.add.reduce(part)) - (sums[end] - sums[begin]) + sum(over for _, over in new if over > 0)

    def settle(self) -> None:
        """Make the draft true. O(runs) array operations."""
        keys, over, new = self.keys, self._over, self._new()
        if len(keys) + len(new) >= len(over):
            self._over = over = np.concatenate([over, np.zeros_like(over)])
        for a, b, nbytes in self._spans():
            over[a:b] += nbytes
        for change in self.draft.changes:
            if change < 0:
                x = bisect_left(keys, ~change)
                over[x : len(keys) - 1] = over[x + 1 : len(keys)]
                del keys[x]
                self.again.remove(~change)
        for key, bytes_over in new:
            x = bisect_left(keys, key)
            over[x + 1 : len(keys) + 1] = over[x : len(keys)]
            over[x] = bytes_over
            keys.insert(x, key)
            self.again.add(key)
        self.extra_seconds += self.draft.seconds
        self.draft, self._sums, self._above = Draft(), [], None

    def _spans(self) -> list[tuple[int, int, int]]:
        """The spans of the draft in places of runs that are there."""
        keys = self.keys
        return [(bisect_right(keys, a), bisect_right(keys, b), nbytes) for a, b, nbytes in self.draft.spans]

    def _new(self) -> list[tuple[int, int]]:
        """The further runs of the draft that are not there yet, and their bytes above the budget."""
        keys, n, facts, found = self.keys, self.n, self.facts, []
        for key in self.draft.changes:
            if key >= 0:
                x = bisect_left(keys, key)
                here = int(self._over[x]) - facts.own_bytes(keys[x]) + facts.again_bytes[key % n]
                for a, b, nbytes in self.draft.spans:
                    if a < key <= b:
                        here += nbytes
                found.append((key, here))
        return found

    @property
    def keys_above(self) -> list[int]:
        """The keys of the runs that are above the budget, ascending."""
        if self._above is None:
            self._above = [self.keys[x] for x in (self.over > 0).nonzero()[0].tolist()]
        return self._above

    def _summed(self) -> list[int]:
        if not self._sums:
            self._sums = [0, *np.cumsum(np.maximum(self.over, 0)).tolist()]
        return self._sums


def _accesses(program: Program, value: int) -> list[int]:
    n, made_by, hold = len(program.ops), program.producer[value], program.hold[value]
    if program.values[value].fixed or made_by < 0:
        return []
    return sorted({i * (n + 1) for i in (made_by, *program.readers[value], *([hold] if hold >= made_by else []))})
