"""Lifetimes of values in an order of runs, as short as possible.

A call runs again as a *block*: its ops from the first one on, one directly after the other. Inside of a block C++
holds values as it did in the first run, so they leave no earlier there; at the end of the block they leave at the
latest, unless they are read later. What the block cannot hand out (``Value.available``) is a copy of its own, beside
one that is in memory already; so is what the backward has been handed and still uses (``Program.handed_until``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoremat.program.model import Program


def block_ends(program: Program, order: Sequence[int]) -> list[int]:
    """Find, for every run, the last run of its block of reruns.

    In no block it is the run itself. O(runs).
    """
    ends = list(range(len(order)))
    if program.has_calls:
        begin, seen, goes_on = program.call_begin, set[int](), [False] * len(order)
        for p, i in enumerate(order):
            goes_on[p] = i in seen and begin[i] < i == order[p - 1] + 1
            seen.add(i)
        for p in range(len(order) - 1, 0, -1):
            if goes_on[p]:
                ends[p - 1] = ends[p]
    return ends


class Lifetimes:
    """Goes through an order once and finds what leaves after each run.

    The attribute ``frees`` has it.
    """

    def __init__(self, program: Program, order: Sequence[int], first_run: Mapping[int, int]) -> None:
        self.frees: list[list[int]] = [[] for _ in order]
        self._program, self._order, self._first_run = program, order, first_run
        self._held_until = [first_run.get(h, -1) for h in program.hold]
        """For every value the run until which it is held, lately by the backward, which was handed it."""
        self._block_end = block_ends(program, order)
        self._since: dict[int, int] = {}
        """For every value the run that has made the copy that lasts."""
        self._last_use: dict[int, int] = {}
        self._lasting: dict[int, list[tuple[int, int]]] = {}
        """For every value the spans of its copies that last; kept for programs with calls."""
        self._inner: dict[int, list[int]] = {}
        """For every value the copy of the latest block that could not hand it out: made in that run, needed until."""
        self._all_inner: list[tuple[int, list[int]]] = []
        self.passing: set[tuple[int, int]] = set()
        """Run and value of every write that makes a copy for its block alone: the call cannot hand it out, or another
        copy is in memory and stays."""
        for p, i in enumerate(order):
            self._run(p, i)
        self._finish()

    def _run(self, p: int, i: int) -> None:
        op, first = self._program.ops[i], self._first_run[i] == p
        for v in op.reads:
            self._read(p, v)
            if (handed := self._program.handed_until[i]) >= 0:
                self._held_until[v] = max(self._held_until[v], self._first_run.get(handed, p))
        for v in op.writes:
            if not first and self._program.available[v] > self._order[self._block_end[p]]:
                self._inner[v] = [p, self._stays(p, v)]
                self._all_inner.append((v, self._inner[v]))
                self.passing.add((p, v))
            else:
                self._write(p, v)
        if first:
            for _, old in op.in_place:
                self._leave(old, self._last_use.pop(old))

    def _read(self, p: int, v: int) -> None:
        inner = self._inner.get(v)
        if inner and self._block_end[inner[0]] >= p:
            inner[1] = max(inner[1], self._stays(p, v))
        else:
            self._last_use[v] = max(self._last_use.get(v, -1), self._stays(p, v))

    def _write(self, p: int, v: int) -> None:
        last = self._last_use.get(v, -1)
        end = max(last, self._held_until[v])
        if last >= 0 and end >= p:
            self.passing.add((p, v))
        else:
            if last >= 0:
                self._leave(v, end)
            self._since[v] = p
        self._last_use[v] = max(last, self._stays(p, v))

    def _stays(self, p: int, v: int) -> int:
        """Find the run of the block until which a used value stays.

        It is used by run ``p``, and stays as long as in the first run.
        """
        if self._block_end[p] == p:
            return p
        return min(self._block_end[p], p + max(0, self._program.hold[v] - self._order[p]))

    def _leave(self, v: int, p: int) -> None:
        self.frees[p].append(v)
        if self._program.has_calls:
            self._lasting.setdefault(v, []).append((self._since.get(v, -1), p))

    def _finish(self) -> None:
        for v, p in self._last_use.items():
            if not self._program.values[v].fixed:
                self._leave(v, max(p, self._held_until[v]))
        for v, (start, end) in self._all_inner:
            if not any(a <= start <= b for a, b in self._lasting.get(v, ())):
                self.frees[end].append(v)
