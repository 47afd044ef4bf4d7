"""An evicting executor that knows the future: walk the program under a limit, drop when full, make again on demand.

The program is run in its mind, in order. Values stay until something does not fit under the limit; then those leave
whose return costs the fewest seconds per byte and time of absence. What a late op asks for and is gone is made again,
together with all that is missing on the way there, under the same limit; so recomputation nests by itself, as deep as
the limit demands, on any graph. A value that leaves before its next use need not have stayed at all:
``Schedule.from_order`` takes every drop back to the last use.

This is the eviction of DTR (Kirisame et al. 2021, "Dynamic Tensor Rematerialization": h = cost / (bytes * staleness),
cost with all missing ancestors) with the future where DTR has to look at the past, as in Belady's rule (1966). "Next
use" includes the use as a source for what is gone itself, so that block inputs outlive what is inside of blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from autoremat.planner import clock
from autoremat.planner.search.tables import NEVER, Tables
from autoremat.program import Op

_STALE = 24
"""After how many changes, and how many ops, all scores are computed anew."""

_FARTHEST = 100
"""How many missing ops a score looks at."""

_SCORE_SECONDS = 2.5e-5
"""What a score counts as work."""

_MOST_RUNS = 6000
"""How many reruns make a walk hopeless; on programs of other sizes twice to ten times their ops."""


@dataclass(frozen=True)
class Rules:
    """What the executor may vary.

    Attributes:
        limit_bytes: of the backward; an op that cannot fit runs all the same, up to ``most_bytes``.
        forward_bytes: limit of the forward, usually lower, so that the backward has room for what it makes again.
        distance_power: weight of the time until the next use; 0 looks at seconds per byte alone.
        dropped: values that leave right after the forward has used them, whatever the room.
        most_bytes: the walk is given up where an op needs more than that, whatever leaves.
        noise: factor on every score, for variety.
        most_scores: the walk is given up after so many scores; it thrashes.
    """

    limit_bytes: int
    forward_bytes: int
    distance_power: float = 1.0
    dropped: frozenset[int] = frozenset()
    most_bytes: int = NEVER
    noise: Callable[[], float] = lambda: 1.0
    most_scores: int = NEVER


@dataclass(frozen=True, eq=False)
class Course:
    """What no plan can change, op by op.

    Attributes:
        tables: of the program.
        during: bytes while each op runs, without the values that are there by decision.
        before: bytes between the op before and this one, without those either.
        released: for every op the values about which there is a decision from then on.
    """

    tables: Tables
    during: tuple[int, ...]
    before: tuple[int, ...]
    released: tuple[tuple[int, ...], ...]


def course_of(tables: Tables) -> Course:
    """The course of a program. O(reads)."""
    n, droppable = len(tables.ops), frozenset(tables.droppable)
    released: list[list[int]] = [[] for _ in range(n)]
    steps = [0] * (n + 1)
    fixed = sum(v.nbytes for v in tables.values if v.fixed)
    for v, end in enumerate(_last_uses(tables)):
        if tables.producer[v] >= 0:
            decided = v in droppable
            end = tables.until[v] if decided else end
            steps[tables.producer[v]] += tables.values[v].nbytes
            steps[end + 1] -= tables.values[v].nbytes
            if decided:
                released[end].append(v)
    resident = [fixed + x for x in accumulate(steps[:n])]
    during = [x + op.scratch_bytes - _taken_over(tables, op) for x, op in zip(resident, tables.ops, strict=True)]
    before = [x - sum(tables.values[v].nbytes for v in op.writes) for x, op in zip(resident, tables.ops, strict=True)]
    return Course(tables, tuple(during), tuple(before), tuple(tuple(r) for r in released))


def _last_uses(tables: Tables) -> list[int]:
    """The last op that reads each value in the plain program or until which it is held."""
    n = len(tables.ops)
    last = [-1 if v.held is None else n - 1 if v.held < 0 else v.held for v in tables.values]
    last = [max(p, h) for p, h in zip(tables.producer, last, strict=True)]
    for i, reads in enumerate(tables.reads):
        for v in reads:
            last[v] = max(last[v], i)
    return last


def _taken_over(tables: Tables, op: Op) -> int:
    return sum(min(tables.values[new].nbytes, tables.values[old].nbytes) for new, old in op.in_place)


def evicting(course: Course, rules: Rules) -> list[tuple[int, int]] | None:
    """The reruns ``(late op before which it happens, op)`` of one walk; None when it is given up.

    O(evictions * values).
    """
    executor = Executor(course, rules)
    for t in range(len(course.tables.ops)):
        executor.step(t)
        if executor.failed:
            return None
    return executor.runs


class Executor:
    """One walk: what is in memory by decision, and what has run again so far."""

    def __init__(self, course: Course, rules: Rules) -> None:
        t = course.tables
        self.course, self.rules, self.tables = course, rules, t
        self.runs: list[tuple[int, int]] = []
        self.failed, self.now, self.bytes = False, 0, 0
        self.resident: dict[int, None] = {}
        self.droppable = frozenset(t.droppable)
        self.size = [v.nbytes for v in t.values]
        self._seconds = list(t.seconds)
        self.busy_until = [-1] * len(t.values)
        self.protected: set[int] = set()
        self._queue: list[tuple[float, int]] = []
        self._sources: dict[int, int] = {}
        self._sources_at, self._changes, self._scored = -_STALE, 0, 0
        self._most_runs = min(10 * len(t.ops), max(2 * len(t.ops), _MOST_RUNS))

    # -- walking -------------------------------------------------------------------------------------------------------

    def step(self, t: int) -> None:
        """Bring what op ``t`` waits for, make room, run it."""
        self.now = t
        if self.tables.late[t]:
            self._bring(t)
        self._make_room(self.course.during[t])
        self.protected = set()
        for v in self.course.released[t]:
            if v not in self.rules.dropped:
                self._enter(v)

    def _bring(self, t: int) -> None:
        """Have in memory all that op ``t`` reads and about which there is a decision."""
        tables = self.tables
        wanted = [v for v in tables.reads[t] if v in self.droppable and t > tables.until[v]]
        self.protected = set(wanted)
        for v in wanted:
            if v not in self.resident:
                self._make(v)
            k = bisect_left(tables.starts[v], t)
            if k < len(tables.starts[v]) and tables.starts[v][k] == t:
                self.busy_until[v] = tables.ends[v][k]

    def _make(self, value: int) -> None:
        """Run again what it takes to have the value, in program order, under the limit."""
        needed = self._missing(value)
        last_reader = {u: i for i in needed for u in self.tables.reads[i]}
        outside = self.protected
        self.protected = outside.union(u for u in last_reader if u in self.resident)
        passing: dict[int, int] = {}
        for i in needed:
            if self.failed:
                break
            grown = self._grown(i, last_reader, passing)
            self._make_room(self.course.before[self.now] + sum(passing.values()) + grown)
            self.runs.append((self.now, i))
            self._take_in(i, last_reader, passing)
            done = [u for u in self.tables.reads[i] if last_reader[u] == i]
            self.protected.difference_update(u for u in done if u not in outside)
            for u in done:
                passing.pop(u, None)
        self.protected = outside

    def _grown(self, i: int, last_reader: dict[int, int], passing: dict[int, int]) -> int:
        """Bytes that a rerun of op ``i`` adds while it runs."""
        op = self.tables.ops[i]
        grown = op.again_scratch_bytes + sum(self.size[v] for v in op.writes if v not in self.resident)
        for new, old in op.in_place:
            if old in passing and last_reader[old] == i:
                grown -= min(self.size[new], self.size[old])
        return grown

    def _take_in(self, i: int, last_reader: dict[int, int], passing: dict[int, int]) -> None:
        """What becomes of the results of a rerun: some stay, some are in use, some only pass."""
        for v in self.tables.ops[i].writes:
            if v not in self.droppable:
                if v in last_reader:
                    passing[v] = self.size[v]
            else:
                self._enter(v)
                if v in last_reader:
                    self.protected.add(v)

    def _missing(self, value: int) -> list[int]:
        """The ops that must run again for the value, in program order."""
        tables, seen, stack = self.tables, set[int](), [self.tables.producer[value]]
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack += [tables.producer[u] for u in tables.reads[i] if not self._at_hand(u)]
                if i in tables.before:
                    stack.append(tables.before[i])
        return sorted(seen)

    def _at_hand(self, value: int) -> bool:
        tables = self.tables
        return value in self.resident or bool(tables.kept[value]) or self.now <= tables.until[value]

    def _enter(self, value: int) -> None:
        if value not in self.resident:
            self.resident[value] = None
            self.bytes += self.size[value]
            self._changes += 1

    # -- evicting ------------------------------------------------------------------------------------------------------

    def _make_room(self, others: int) -> None:
        """Evict until what is there by decision fits beside ``others`` bytes, as far as possible."""
        limit = self.rules.limit_bytes if self.tables.late[self.now] else self.rules.forward_bytes
        if self.bytes + others <= limit:
            return
        idle = [v for v in self.resident if self._idle(v)]
        if self.bytes + others - sum(self.size[v] for v in idle) >= limit:
            for v in idle:
                self._leave(v)
        else:
            self._evict(limit - others)
        is_hopeless = len(self.runs) > self._most_runs or self._scored > self.rules.most_scores
        self.failed |= is_hopeless or self.bytes + others > self.rules.most_bytes or clock.is_over()

    def _evict(self, limit: int) -> None:
        """Evict some of what is idle until the rest fits."""
        victims: list[int] = []
        while self.bytes > limit:
            victims.append(self._victim())
            self._leave(victims[-1])
        self._readmit(victims, limit)

    def _leave(self, value: int) -> None:
        del self.resident[value]
        self.bytes -= self.size[value]

    def _readmit(self, victims: list[int], limit: int) -> None:
        """Let those stay after all that still fit once the last, perhaps large, one has left; dearest first."""
        for v in reversed(victims[:-1]):
            if self.bytes + self.size[v] <= limit:
                self._enter(v)

    def _victim(self) -> int:
        """The idle value with the lowest score; there is one."""
        if self._changes >= _STALE:
            self._queue = []
        while True:
            while self._queue:
                _, v = self._queue.pop()
                if v in self.resident and self._idle(v):
                    self._changes += 1
                    return v
            self._queue = self._scores()

    def _scores(self) -> list[tuple[float, int]]:
        """All that may leave, the lowest score last."""
        if self._changes >= _STALE or self.now - self._sources_at >= _STALE:
            self._sources, self._sources_at = self._uses_as_source(), self.now
            self._changes = 0
        now, busy, protected, score = self.now, self.busy_until, self.protected, self._score
        idle = [v for v in self.resident if busy[v] < now and v not in protected]
        self._scored += len(idle)
        clock.spend(_SCORE_SECONDS * len(idle))
        return sorted(((score(v), v) for v in idle), reverse=True)

    def _idle(self, value: int) -> bool:
        return value not in self.protected and self.busy_until[value] < self.now

    def _score(self, value: int) -> float:
        """Seconds of the return per byte and time of absence; 0 when nothing needs the value again."""
        due = min(self.tables.first_start(value, self.now), self._sources.get(value, NEVER))
        if due >= NEVER:
            return 0.0
        absence: float = (max(0, due - self.now) + 1) ** self.rules.distance_power
        return self._cost(value) / (self.size[value] * absence) * self.rules.noise()

    def _cost(self, value: int) -> float:
        """Seconds to make the value again from what is in memory now."""
        resident, now, seconds, kept = self.resident, self.now, self._seconds, self.tables.kept
        until, producer, reads = self.tables.until, self.tables.producer, self.tables.reads
        before = self.tables.before
        total, seen, stack = 1e-9, set[int](), [producer[value]]
        while stack and len(seen) < _FARTHEST:
            i = stack.pop()
            if i in seen:
                continue
            seen.add(i)
            total += seconds[i]
            if i in before:
                stack.append(before[i])
            for u in reads[i]:
                if u not in resident and not kept[u] and now > until[u]:
                    stack.append(producer[u])
        return total

    def _uses_as_source(self) -> dict[int, int]:
        """For every value the next late op that asks for something gone which is made from it. O(reads)."""
        tables, soonest, now, resident = self.tables, dict[int, int](), self.now, self.resident
        until, kept, reads, first_start = tables.until, tables.kept, tables.reads, tables.first_start
        for i in tables.replayed:
            if i >= now:
                continue
            due = NEVER
            for w in tables.ops[i].writes:
                if w not in resident and not kept[w] and now > until[w]:
                    due = min(due, first_start(w, now - 1), soonest.get(w, NEVER))
            if due < NEVER:
                for u in reads[i]:
                    if due < soonest.get(u, NEVER):
                        soonest[u] = due
        return soonest
