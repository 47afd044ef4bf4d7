"""From a plan to what the tape does: which values to hold on to, and what to run again when the backward asks.

Pure data, no torch. Values and ops carry the numbers that the recorder and the tape give them while the forward runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from autoremat.program import Plan, Program, Schedule, Timeline, simulate

UNSEEN = "is changed by something that torch does not see"
"""How the reasons end of ops that must not run again because NumPy or compiled code writes what they make or read."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """Run an op of the forward again, then let go of some values.

    Attributes:
        op: number of the op on the tape.
        install: values that it makes and that stay for a while.
        drops: values to let go of afterwards.
    """

    op: int
    install: frozenset[int]
    drops: frozenset[int]


@dataclass(frozen=True, slots=True)
class Event:
    """The backward asks for a value: first run ``reruns``, hand it out, then let go of it if ``drop``."""

    value: int
    reruns: tuple[Rerun, ...]
    drop: bool


@dataclass(frozen=True)
class Instructions:
    """What the tape follows.

    Attributes:
        path: for every op of the forward, its name and the made values that it reads: the path of the plan.
        keep: values to hold on to when the forward makes them.
        forget: saved values to let go of although the backward will ask for them.
        asked: values that the backward will ask for: the forward saves them.
        again: ops that will run again.
        events: what to do at each request of the backward, in order.
        ready: ops to be ready to run again: those, and where the path may vary all that may run again.
        twice: ops among ``again`` for whose second run, right after the first, the budget has room.
        sizes: bytes of every value that the forward makes.
        spare_bytes: by how much the budget exceeds the plan's peak.
        budget_bytes: the budget; None: a step off the path may take what it likes.
        beside_bytes: what anything but the values that the tape holds takes at most: in the forward, then from each
            request of the backward to the next.
        fixed_bytes: what is always there.
        writes_unseen: the forward is known to write memory in ways that torch does not see.
        where: for every op of the forward, its module and its line, for error messages.
    """

    path: tuple[tuple[str, tuple[int, ...]], ...]
    keep: frozenset[int]
    forget: frozenset[int]
    asked: frozenset[int]
    again: frozenset[int]
    events: tuple[Event, ...]
    ready: frozenset[int] = frozenset()
    twice: frozenset[int] = frozenset()
    sizes: Mapping[int, int] = field(default_factory=dict)
    spare_bytes: int = 0
    budget_bytes: int | None = None
    beside_bytes: tuple[int, ...] = (0,)
    fixed_bytes: int = 0
    writes_unseen: bool = False
    where: tuple[tuple[str, str], ...] = ()

    @cached_property
    def largest_bytes(self) -> int:
        """The size of the largest value that the forward makes."""
        return max(self.sizes.values(), default=0)

    @cached_property
    def installs(self) -> Counter[int]:
        """How often each value is made again."""
        return Counter(n for event in self.events for rerun in event.reruns for n in rerun.install)


@dataclass
class _Residency:
    """One stay of a value in memory, with the places where the tape has to do with it."""

    made_by: int
    last_access: int | None = None


def instructions_for(plan: Plan, *, may_vary: bool = False) -> Instructions:
    """The instructions that carry out the plan of a recorded program. O(runs + reads).

    Args:
        plan: for a recorded program.
        may_vary: other calls of the same kind may take another path.
    """
    return _Compiler(plan.program, plan.schedule, plan.budget_bytes, may_vary).compile()


@dataclass
class _Compiler:
    program: Program
    schedule: Schedule
    budget_bytes: int
    may_vary: bool
    number: dict[int, int] = field(default_factory=dict)
    tape_op: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        made = [i for i, v in enumerate(self.program.values) if not v.fixed]
        self.number = {v: n for n, v in enumerate(made)}
        self.tape_op = {i: k for k, i in enumerate(self.program.forward)}

    def compile(self) -> Instructions:
        ops, order = self.program.ops, self.schedule.order
        again = self._reruns()
        stays = self._residencies(again)
        drops = self._drops(stays)
        installed = {(s.made_by, v) for v, ss in stays.items() for s in ss if s.last_access is not None}
        events: list[Event] = []
        pending: list[Rerun] = []
        for p, i in enumerate(order):
            if p in again:
                install = frozenset(self.number[v] for v in ops[i].writes if (p, v) in installed)
                pending.append(Rerun(self.tape_op[i], install, self._numbers(drops.get(p, ()))))
            elif ops[i].name == "unpack":
                (value,) = ops[i].reads[:1]
                events.append(Event(self.number[value], tuple(pending), value in drops.get(p, ())))
                pending = []
        first = {v: ss[0] for v, ss in stays.items()}
        asked = {e.value for e in events}
        timeline = simulate(self.program, self.schedule)
        keep = {self.number[v] for v, s in first.items() if s.last_access is not None}
        return Instructions(
            path=tuple((ops[i].name, self._made_reads(i)) for i in self.tape_op),
            keep=frozenset(keep),
            forget=frozenset(asked - keep),
            asked=frozenset(asked),
            again=frozenset(self.tape_op[order[p]] for p in again),
            events=tuple(events),
            ready=frozenset(k for i, k in self.tape_op.items() if self.may_vary and not ops[i].repeatable).union(
                self.tape_op[order[p]] for p in again
            ),
            twice=self._twice({order[p] for p in again}, timeline),
            sizes={self.number[v]: self.program.values[v].nbytes for i in self.tape_op for v in ops[i].writes},
            spare_bytes=self.budget_bytes - timeline.peak_bytes,
            budget_bytes=self.budget_bytes,
            beside_bytes=self._beside(stays, timeline),
            fixed_bytes=self.program.fixed_bytes,
            writes_unseen=any(op.repeatable.endswith(UNSEEN) for op in ops),
            where=tuple((ops[i].module, ops[i].source) for i in self.tape_op),
        )

    def _reruns(self) -> set[int]:
        """Positions of the further runs in the schedule."""
        seen: set[int] = set()
        positions = set()
        for p, i in enumerate(self.schedule.order):
            if i in seen:
                positions.add(p)
            seen.add(i)
        return positions

    def _twice(self, again: set[int], timeline: Timeline) -> frozenset[int]:
        """Ops whose results, and copies of what they overwrite, fit in once more at their first run."""
        bytes_of: dict[int, int] = {}
        for i, resident in zip(self.schedule.order, timeline.resident_bytes, strict=True):
            bytes_of.setdefault(i, resident)
        found = set()
        for i in again:
            op = self.program.ops[i]
            written = sum(self.program.values[v].nbytes for v in op.writes)
            copied = sum(self.program.values[old].nbytes for _, old in op.in_place)
            if bytes_of[i] + written + copied <= self.budget_bytes:
                found.add(self.tape_op[i])
        return frozenset(found)

    def _beside(self, stays: dict[int, list[_Residency]], timeline: Timeline) -> tuple[int, ...]:
        """The most bytes that are not values held by the tape: in the forward, and from each request to the next."""
        change = [0] * (len(self.schedule.order) + 1)
        for v, ss in stays.items():
            for s in ss:
                if s.last_access is not None:
                    change[s.made_by] += self.program.values[v].nbytes
                    change[s.last_access + 1] -= self.program.values[v].nbytes
        found = [0]
        for i, resident, held in zip(self.schedule.order, timeline.resident_bytes, accumulate(change), strict=False):
            if self.program.ops[i].name == "unpack":
                found.append(0)
            found[-1] = max(found[-1], resident - held)
        return tuple(found)

    def _residencies(self, again: set[int]) -> dict[int, list[_Residency]]:
        """The stays of every made value; accesses of the tape are requests of the backward and reads of reruns."""
        stays: dict[int, list[_Residency]] = {}
        for p, i in enumerate(self.schedule.order):
            op = self.program.ops[i]
            # The first read of an unpack is what it asks for; the others its node happens to hold already.
            asked = op.reads if p in again else op.reads[:1] if op.name == "unpack" else ()
            for v in asked:
                if v in stays:
                    stays[v][-1].last_access = p
            for v in op.writes:
                stays.setdefault(v, []).append(_Residency(p))
        return stays

    def _drops(self, stays: dict[int, list[_Residency]]) -> dict[int, list[int]]:
        """For every position of the schedule the values that the tape lets go of there."""
        drops: dict[int, list[int]] = {}
        for v, ss in stays.items():
            for s in ss:
                if s.last_access is not None:
                    drops.setdefault(s.last_access, []).append(v)
        return drops

    def _made_reads(self, i: int) -> tuple[int, ...]:
        return tuple(self.number[v] for v in self.program.ops[i].reads if v in self.number)

    def _numbers(self, values: list[int] | tuple[int, ...]) -> frozenset[int]:
        return frozenset(self.number[v] for v in values)
