"""``judged``: the peak and the extra time of a schedule, from nothing but the two files.

It imports nothing of autoremat, and no planner knows it: data as JSON has them go in, figures and faults come out. What
a schedule must obey beyond what is asked here (calls that run again from their first op on, where reruns may stand) is
``verify``'s to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What a schedule really costs.

    Attributes:
        peak_bytes: the most bytes that are in memory while any op runs.
        overhead: seconds of all further runs, as a fraction of the seconds of the program.
        faults: what cannot be carried out, in words; nothing where all is well.
    """

    peak_bytes: int
    overhead: float
    faults: tuple[str, ...]


def judged(program: Mapping[str, Any], order: Sequence[int], frees: Sequence[Sequence[int]]) -> Verdict:
    """The verdict on a schedule of a program.

    Args:
        program: JSON data of the format ``autoremat-program``.
        order: op indices in the order they run, repeats included.
        frees: for every run the values, by their index in the file, that leave right after it. O(runs + reads).
    """
    memory = _Memory(program)
    for run, (i, leaving) in enumerate(zip(order, frees, strict=True)):
        memory.carry_out(run, i, leaving)
    missing = [i for i in range(len(memory.ops)) if i not in memory.seen]
    faults = [*memory.faults, *(f"op {i} never runs" for i in missing)]
    plain = fsum(op.get("seconds", 0.0) for op in memory.ops)
    return Verdict(memory.peak, fsum(memory.extra) / plain if plain else 0.0, tuple(faults))


class _Memory:
    """What is in memory, run by run."""

    def __init__(self, program: Mapping[str, Any]) -> None:
        self.ops, self.values = program["ops"], program["values"]
        self.index = {value["id"]: v for v, value in enumerate(self.values)}
        self.there = {v for v, value in enumerate(self.values) if value.get("fixed")}
        self.bytes = sum(self.values[v]["bytes"] for v in self.there)
        self.twice = 0
        """Bytes of copies that are there a second time, up to the end of a call that runs again."""
        self.peak, self.seen, self.extra, self.before = self.bytes, set[int](), list[float](), -1
        self.faults = list[str]()

    def carry_out(self, run: int, i: int, leaving: Sequence[int]) -> None:
        """One run, and what leaves after it."""
        op, again = self.ops[i], i in self.seen
        reads, writes = ([self.index[name] for name in op[field]] for field in ("reads", "writes"))
        self.faults += (f"run {run}: {fault}" for fault in self._faults(i, reads, leaving, writes))
        if not (again and i == self.before + 1 and op.get("call", -1) == self.ops[self.before].get("call", -1) >= 0):
            self.bytes, self.twice = self.bytes - self.twice, 0
        made = sum(self._size(v) for v in writes)
        taken = [(self.index[new], self.index[old]) for new, old in op.get("in_place", {}).items()]
        reused = sum(min(self._size(new), self._size(old)) for new, old in taken if old in leaving)
        self.peak = max(self.peak, self.bytes + made - reused + self._of(op, "scratch_bytes", again))
        if again:
            self.extra.append(self._of(op, "seconds", again))
        self.twice += sum(self._size(v) for v in writes if v in self.there)
        self.there.update(writes)
        self.there.difference_update(leaving)
        self.bytes += made - sum(self._size(v) for v in leaving)
        self.seen.add(i)
        self.before = i

    def _faults(self, i: int, reads: list[int], leaving: Sequence[int], writes: list[int]) -> Iterator[str]:
        again = i in self.seen
        if again and self.ops[i].get("once"):
            yield f"op {i} must not run again"
        if not again and self.seen and i < max(self.seen):
            yield f"op {i} runs first after a later one"
        for v in reads:
            if v not in self.there:
                yield f"op {i} reads {self.values[v]['id']}, which is not in memory"
        for v in leaving:
            held = self.values[v].get("held", -1)
            if v not in self.there and v not in writes:
                yield f"{self.values[v]['id']} leaves, but it is not in memory"
            if self.values[v].get("fixed") or (held == "end" and i < len(self.ops) - 1):
                yield f"{self.values[v]['id']} leaves, but it stays to the end"
            elif held != "end" and held not in (-1, i) and held not in self.seen:
                yield f"{self.values[v]['id']} leaves, but it is held until op {held}"

    def _size(self, v: int) -> int:
        return int(self.values[v]["bytes"])

    @staticmethod
    def _of(op: Mapping[str, Any], field: str, again: bool) -> Any:
        first = op.get(field, 0)
        return op.get(f"rerun_{field}", first) if again else first
