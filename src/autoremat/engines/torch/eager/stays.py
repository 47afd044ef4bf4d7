"""Stays: when a planned value is in memory, and needed there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from autoremat.engines.torch.eager.path import Path
from autoremat.program import Program, Schedule
from autoremat.program.lifetimes import Lifetimes


@dataclass
class Stay:
    """One stay of a value in memory."""

    made_at: int
    last_read: int | None = None
    """The last position at which the tape itself reads the value.

    It reads values to rerun a call, or to answer a handle.
    """
    asks: list[int] = field(default_factory=list)


class Stays:
    """The stays of all values under a schedule. O(runs + reads).

    Args:
        program: of the step.
        schedule: of its plan.
        path: of its forward.

    Attributes:
        by_value: for every value its stays, in order.
        number: for every value that is made, its number in the path.
        reruns: positions of reruns.
        pack_at: for every position at which the backward asks, the number of the pack.
    """

    def __init__(self, program: Program, schedule: Schedule, path: Path) -> None:
        self.program, self.order, self._path = program, schedule.order, path
        self.number = {v: n for n, v in enumerate(v for v, value in enumerate(program.values) if not value.fixed)}
        first: dict[int, int] = {}
        self.reruns = {p for p, i in enumerate(self.order) if first.setdefault(i, p) != p}
        self._passing = Lifetimes(program, self.order, first).passing
        asks = iter(path.asks)
        self.pack_at = {p: next(asks) for p, i in enumerate(self.order) if program.ops[i].kind == "ask"}
        self.by_value = self._found()

    def _found(self) -> dict[int, list[Stay]]:
        """Find the stays of every value.

        A value that is still there when a rerun makes it again stays, and the new copy goes.
        """
        stays: dict[int, list[Stay]] = {}
        for p, i in enumerate(self.order):
            op = self.program.ops[i]
            if op.kind == "ask" and op.reads[0] in stays:
                stays[op.reads[0]][-1].asks.append(p)
            for v in op.writes:
                if (p, v) not in self._passing:
                    stays.setdefault(v, []).append(Stay(p))
        return stays

    def kept_packs(self, away: Collection[int] = ()) -> set[int]:
        """Find packs that are asked for only while the forward's value remains.

        Those of values that are away for a while are not. Nor is the pack at which a value becomes known that is made
        inside a call, such as a weight that autocast has converted and keeps for further calls, if one of these is not.
        """
        later = {self.pack_at[p] for v in away for s in self.by_value[v] for p in s.asks}
        for ss in self.by_value.values():
            later |= {self.pack_at[p] for s in ss[1:] for p in s.asks}
        values = {self._path.packed[j] for j in later if j >= 0}
        later |= {c.packs[0] + i for c in self._path.calls for i, v in c.saved if v in values}
        return set(range(len(self._path.packed))) - later

    def find_last_reads(self, packs: tuple[int | None, ...]) -> None:
        """Note, for every stay, where the tape itself needs it last."""
        current: dict[int, int] = {}
        written: dict[int, int] = {}
        for p, i in enumerate(self.order):
            op = self.program.ops[i]
            if p in self.reruns:
                block = self._block_begin(p)
                for v in op.reads:
                    if v in current and written[v] < block:
                        self.by_value[v][current[v]].last_read = p
            elif op.kind == "ask":
                v, j = op.reads[0], self.pack_at[p]
                if v in current and j >= 0 and packs[j] is not None:
                    self.by_value[v][current[v]].last_read = p
            for v in op.writes:
                written[v] = p
                if (p, v) not in self._passing:
                    current[v] = current.get(v, -1) + 1

    def at_end(self) -> frozenset[int]:
        """Find the values that are kept from the forward for later.

        The forward ends with the passes within it. The last reads have been found.
        """
        last = max(self.program.forward, default=-1)
        end = next((p for p, i in enumerate(self.order) if i == last), -1)
        return frozenset(
            self.number[v] for v, ss in self.by_value.items()
            if any(s.made_at <= end < max(s.last_read or 0, *s.asks, 0) for s in ss)
        )  # fmt: skip

    def _block_begin(self, p: int) -> int:
        """Return the position where the block of a rerun begins.

        A block is the rerun of one call, from its first op on.
        """
        call = self.program.ops[self.order[p]].call
        while (
            p - 1 in self.reruns
            and self.program.ops[self.order[p - 1]].call == call
            and self.order[p - 1] < self.order[p]
        ):
            p -= 1
        return p
