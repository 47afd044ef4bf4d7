"""Local search on what to drop: shave the peak, fill the room.

A ``Candidate`` says what is dropped (``unroll.Levels``) and knows its account. ``shave`` lowers the peak: of the values
resident at the peak that nothing needs right there, it drops those whose return costs the fewest seconds per byte.
``fill`` spends the room below a budget: it keeps what saves the most seconds per byte. Both are greedy with full
knowledge of the future, and both simulate after every batch of choices, because a rerun moves other residencies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from autoremat.planner import clock
from autoremat.planner.search.account import Account
from autoremat.planner.search.call_account import accountant_of
from autoremat.planner.search.calls import planned_as
from autoremat.planner.search.reusing import reuse
from autoremat.planner.search.tables import Tables, tables_of
from autoremat.planner.search.unrolled import Levels, reruns
from autoremat.program import Program, Schedule
from autoremat.program.decisions import can_carry_out

_MAX_COPIES = 6
"""How many copies of a value a plan may drop one after the other."""

_TOO_MUCH = 1 << 62
"""The peak of what the engine cannot run."""

_MOST_KNOWN = 100_000
"""How many candidates to keep, times ops: small programs meet the same candidates again and again."""


_LOOK_SECONDS, _RUN_SECONDS = 4e-4, 3e-6
"""What a look at a candidate counts as work: in any case, and for each of its runs."""

_RETURN_SECONDS = 4e-5
"""What an estimate of the cost of a return counts as work."""


def no_noise() -> float:
    """Scores as they are."""
    return 1.0


@dataclass(frozen=True, eq=False)
class Entry:
    """A candidate without its account: what is dropped, its peak and the seconds it costs.

    ``runs`` are the reruns of a candidate that no levels describe; ``dropped`` is empty then.
    """

    name: str
    dropped: Levels
    peak_bytes: int
    extra_seconds: float
    runs: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is dropped, and the bytes and seconds that come of it.

    Attributes:
        name: of the algorithm it comes from.
        dropped: from the forward, of the first copies made again, of the second, ...
        runs: the reruns as ``(late op, op)``.
        account: bytes run by run.
        walked: the runs come from a walk (``evict``), and no levels describe them.
        can_run: the engine can run every op as often as this does; otherwise no budget is large enough for it.
    """

    name: str
    dropped: Levels
    runs: list[tuple[int, int]]
    account: Account
    walked: bool = False
    can_run: bool = True

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any run."""
        return self.account.peak_bytes if self.can_run else _TOO_MUCH

    @property
    def extra_seconds(self) -> float:
        """Duration of the reruns."""
        return self.account.extra_seconds

    @property
    def entry(self) -> Entry:
        """What is worth remembering."""
        runs = tuple(self.runs) if self.walked else None
        return Entry(self.name, self.dropped, self.peak_bytes, self.extra_seconds, runs)

    @property
    def rank(self) -> tuple[float, int]:
        """Fewer seconds first, then fewer bytes."""
        return (self.extra_seconds, self.peak_bytes)


class Search:
    """The moves on candidates of one program.

    Attributes:
        tables, accountant: facts about the program.
        frontier: of all candidates seen those that no other beats in both bytes and seconds, by rising peak.
        leveled: the same of the candidates that are not walked, which alone ``shave`` and ``fill`` can change.
        found: those that came into either, in the order they came.
        evaluations: how many candidates were looked at.
        noise: factor on every score of ``shave`` and ``fill``; 1.0 unless a search wants variety.
    """

    def __init__(self, program: Program) -> None:
        planned = planned_as(program)
        self._limited = planned if planned.abilities.are_limited else None
        self.tables: Tables = tables_of(planned)
        self.accountant = accountant_of(planned)
        self.frontier: list[Entry] = []
        self.leveled: list[Entry] = []
        self.found: list[Entry] = []
        self.evaluations = 0
        self.noise: Callable[[], float] = no_noise
        self._known: dict[Levels, Candidate] = {}
        self._droppable = frozenset(self.tables.droppable)

    def keeping(self, name: str, *keeps: frozenset[int]) -> Candidate:
        """The candidate that keeps the given values, then of the copies made again the next given values, ..."""
        levels: list[frozenset[int]] = []
        dropped = self._droppable
        for keep in keeps:
            dropped = dropped - keep
            levels.append(dropped)
        return self.evaluate(name, tuple(levels))

    def evaluate(self, name: str, dropped: Levels) -> Candidate:
        """Unroll and account. O(levels * reads)."""
        while len(dropped) > 1 and not dropped[-1]:
            dropped = dropped[:-1]
        known = self._known.get(dropped)
        candidate = replace(known, name=name) if known else self._look_at(name, dropped)
        self.note(candidate)
        return candidate

    def _candidate(self, name: str, dropped: Levels, runs: list[tuple[int, int]], walked: bool = False) -> Candidate:
        account = self.accountant(self.accountant.order(runs))
        return Candidate(name, dropped, runs, account, walked, self._can_run(account))

    def _can_run(self, account: Account) -> bool:
        limited = self._limited
        return limited is None or can_carry_out(limited, Schedule.from_order(limited, account.order.tolist()))

    def _look_at(self, name: str, dropped: Levels) -> Candidate:
        runs = reruns(self.tables, dropped)
        candidate = self._candidate(name, dropped, runs)
        self.evaluations += 1
        if len(self._known) * len(self.tables.ops) < _MOST_KNOWN:
            self._known[dropped] = candidate
        return candidate

    def look(self, name: str, runs: list[tuple[int, int]]) -> Candidate:
        """The candidate with the given reruns as they are."""
        self.evaluations += 1
        candidate = self._candidate(name, (), runs, walked=True)
        self.note(candidate)
        return candidate

    def reuse(
        self, name: str, runs: list[tuple[int, int]], budget_bytes: int, tables: Tables | None = None
    ) -> Candidate:
        """The candidate with the given reruns, less those that the room below the budget makes superfluous."""
        left, account = reuse(tables or self.tables, self.accountant, runs, budget_bytes, noise=self.noise)
        self.evaluations += 1
        candidate = Candidate(name, (), left, account, walked=True, can_run=self._can_run(account))
        self.note(candidate)
        return candidate

    def note(self, candidate: Candidate) -> None:
        """Take note of a candidate that was looked at."""
        clock.spend(_LOOK_SECONDS + _RUN_SECONDS * len(candidate.account.order))
        self.remember(candidate.entry)

    def remember(self, entry: Entry) -> None:
        """Take note of a candidate that no other beats."""
        new = _insert(self.frontier, entry)
        if entry.runs is None:
            new |= _insert(self.leveled, entry)
        if new:
            self.found.append(entry)

    def recall(self, entry: Entry) -> Candidate:
        """The candidate of an entry."""
        if entry.runs is not None:
            return self._candidate(entry.name, (), list(entry.runs), walked=True)
        return self.evaluate(entry.name, entry.dropped)

    def best_within(self, budget_bytes: int) -> Entry | None:
        """The candidate with the fewest extra seconds among all seen that fit."""
        k = bisect_right([c.peak_bytes for c in self.frontier], budget_bytes)
        return self.frontier[k - 1] if k else None

    # -- shave ---------------------------------------------------------------------------------------------------------

    def shave(
        self,
        start: Candidate,
        target_bytes: int,
        *,
        name: str = "",
        byte_time: bool = False,
        rounds: int = 60,
        deadline: float = float("inf"),
    ) -> Candidate:
        """Lower the peak towards the target; the last candidate, or the lowest when the target is out of reach.

        A walked candidate stays as it is: a walk with a lower limit is the way to lower that one.
        """
        if start.walked:
            return start
        current = lowest = start
        stuck = 0
        for _ in range(rounds):
            if current.peak_bytes <= target_bytes or stuck >= 8 or clock.is_over(deadline):
                break
            drops = self._drops(current, target_bytes, byte_time)
            if not drops:
                break
            current = self.evaluate(name or start.name, _without(current.dropped, drops))
            stuck = 0 if current.peak_bytes < lowest.peak_bytes else stuck + 1
            lowest = min(lowest, current, key=lambda c: c.peak_bytes)
        return current if current.peak_bytes <= target_bytes else lowest

    def _drops(self, current: Candidate, target_bytes: int, byte_time: bool) -> list[tuple[int, int]]:
        """``(value, level)`` pairs to drop at the peak: the cheapest, enough for half of the excess at least."""
        excess = current.peak_bytes - target_bytes
        wanted = excess / 2 if excess > current.peak_bytes / 50 else excess
        options = []
        for v, level, gap_begin, gap_end in self._idle_at(current.account, current.account.peak_run):
            cost = self._cost_of_return(current, v, gap_end)
            size = self.tables.values[v].nbytes * ((gap_end - gap_begin) if byte_time else 1)
            options.append((cost / size * self.noise(), v, level))
        clock.spend(_RETURN_SECONDS * len(options))
        freed, chosen = 0, list[tuple[int, int]]()
        for score, v, level in sorted(options):
            if freed >= wanted or score == float("inf"):
                break
            chosen.append((v, level))
            freed += self.tables.values[v].nbytes
        return chosen

    def _idle_at(self, account: Account, run: int) -> Iterator[tuple[int, int, int, int]]:
        """Droppable values that are in memory at the run without being used: value, level, last and next use."""
        covering = np.flatnonzero((account.start < run) & (account.end > run)).tolist()
        owners, bounds = account.value, np.append(account.first_access, len(account.access))
        for k in covering:
            v = int(owners[k])
            if v not in self._droppable:
                continue
            uses = account.access[bounds[k] : bounds[k + 1]]
            after = int(np.searchsorted(uses, run, side="right"))
            if after == len(uses) or uses[after - 1] == run:
                continue
            level = self._level(account, k, v, int(uses[after - 1]))
            if level < _MAX_COPIES and self._can_wait(account, v, int(uses[after])):
                yield v, level, int(uses[after - 1]), int(uses[after])

    def _level(self, account: Account, residency: int, value: int, last_use: int) -> int:
        """The index in ``dropped`` that decides on the gap after ``last_use``."""
        copies = residency - int(np.searchsorted(account.value, value))
        used_late = int(account.progress[last_use]) > self.tables.until[value]
        return 1 if copies == 0 and used_late else copies

    def _can_wait(self, account: Account, value: int, run: int) -> bool:
        """Whether the value may be made again right before the run."""
        i = int(account.order[run])
        return not self.tables.late[i] or i in self.tables.starts[value]

    def _cost_of_return(self, current: Candidate, value: int, run: int) -> float:
        """Seconds to make the value again before the run, from what is in memory then."""
        t, account = self.tables, current.account
        seconds, seen, stack = 0.0, set[int](), [t.producer[value]]
        while stack:
            i = stack.pop()
            if i in seen:
                continue
            if not t.rerunnable[i] or len(seen) > 200:
                return float("inf")
            seen.add(i)
            seconds += t.seconds[i]
            if i in t.before:
                stack.append(t.before[i])
            stack += [t.producer[u] for u in t.reads[i] if not account.resident(u, run)]
        return seconds

    # -- fill ----------------------------------------------------------------------------------------------------------

    def fill(
        self, start: Candidate, budget_bytes: int, *, rounds: int = 24, deadline: float = float("inf")
    ) -> Candidate:
        """Keep more while the peak stays within the budget; never worse than ``start``."""
        if start.walked:
            return self.reuse(start.name, start.runs, budget_bytes)
        best, refused = start, set[tuple[int, int]]()
        size = 1 << 30
        for _ in range(rounds):
            if clock.is_over(deadline):
                break
            picks = self._picks(best, budget_bytes, refused)[:size]
            if not picks:
                break
            trial = self.evaluate(best.name, _with(best.dropped, picks))
            if trial.peak_bytes <= budget_bytes and trial.rank < best.rank:
                best, size = trial, max(size, 2 * len(picks))
            elif len(picks) == 1:
                refused.add(picks[0])
            else:
                size = len(picks) // 2
        return best

    def _picks(self, current: Candidate, budget_bytes: int, refused: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """What to keep, best seconds per byte first, as far as the room in every run of the gap allows."""
        during = current.account.during.copy()
        saver = _Savings(self.tables, current)
        options = []
        for v, level, begin, end in _gaps(current):
            if (v, level) not in refused and v in current.dropped[level]:
                saved = saver.of(v, level)
                if saved > 0:
                    options.append((-saved / self.tables.values[v].nbytes * self.noise(), begin, end, v, level))
        picks, taken = list[tuple[int, int]](), set[int]()
        for _, begin, end, v, level in sorted(options):
            nbytes = self.tables.values[v].nbytes
            room = during[begin + 1 : end]
            if v not in taken and int(room.max(initial=0)) + nbytes <= budget_bytes:
                room += nbytes
                picks.append((v, level))
                taken.add(v)
        return picks


def _insert(frontier: list[Entry], entry: Entry) -> bool:
    """Keep the entries that no other beats in both bytes and seconds, by rising peak; whether this is one of them."""
    k = bisect_right(frontier, entry.peak_bytes, key=lambda e: e.peak_bytes)
    if k and frontier[k - 1].extra_seconds <= entry.extra_seconds:
        return False
    while k < len(frontier) and frontier[k].extra_seconds >= entry.extra_seconds:
        del frontier[k]
    if k and frontier[k - 1].peak_bytes == entry.peak_bytes:
        k -= 1
        del frontier[k]
    frontier.insert(k, entry)
    return True


def _gaps(current: Candidate) -> Iterator[tuple[int, int, int, int]]:
    """Spans in which a dropped value is not in memory: value, level, end of one residency, start of the next."""
    account = current.account
    same = np.flatnonzero(account.value[1:] == account.value[:-1])
    first = np.searchsorted(account.value, account.value[same])
    levels = np.minimum(same - first, len(current.dropped) - 1)
    yield from zip(
        account.value[same].tolist(),
        levels.tolist(),
        account.end[same].tolist(),
        account.start[same + 1].tolist(),
        strict=True,
    )


class _Savings:
    """Seconds saved by keeping one value more: its op, and all ops that ran again only for that one."""

    def __init__(self, tables: Tables, current: Candidate) -> None:
        self._tables = tables
        self._dropped = current.dropped
        self._runs = [i for _, i in current.runs]
        self._again = set(self._runs)

    @cached_property
    def _users(self) -> dict[int, int]:
        """How many reruns and late ops ask for each value that is not kept."""
        users: dict[int, int] = {}
        for i in self._again:
            for v in self._tables.reads[i]:
                users[v] = users.get(v, 0) + 1
            for v in self._tables.ops[i].writes:
                if self._tables.starts[v]:
                    users[v] = users.get(v, 0) + 1
        return users

    @cached_property
    def _included(self) -> set[int]:
        """Ops that run again as a part of others that do."""
        return {self._tables.before[i] for i in self._again if i in self._tables.before}

    def _seconds(self, i: int) -> float:
        """What one rerun of an op costs beside those of the others."""
        return 0.0 if i in self._included else self._tables.ops[i].again_seconds

    def of(self, value: int, level: int) -> float:
        """An estimate; exact where values run again once."""
        producer = self._tables.producer[value]
        if level:
            return self._seconds(producer)
        gone: dict[int, int] = {value: self._users.get(value, 0)}
        seconds, stack = 0.0, [producer]
        while stack:
            i = stack.pop()
            if i in self._again and all(gone.get(v, 0) >= self._users.get(v, 0) for v in self._tables.ops[i].writes):
                seconds += self._seconds(i)
                for u in self._tables.reads[i]:
                    gone[u] = gone.get(u, 0) + 1
                    if gone[u] == self._users.get(u, 0) and u in self._dropped[0]:
                        stack.append(self._tables.producer[u])
        return seconds


def _without(dropped: Levels, drops: list[tuple[int, int]]) -> Levels:
    """Drop more: a value dropped at a level is dropped at all levels before it, too."""
    levels = [set(level) for level in dropped]
    for v, level in drops:
        while len(levels) <= level:
            levels.append(set())
        for earlier in levels[: level + 1]:
            earlier.add(v)
    return tuple(frozenset(level) for level in levels)


def _with(dropped: Levels, picks: list[tuple[int, int]]) -> Levels:
    """Keep more: a value kept at a level stays at all levels after it, too."""
    levels = [set(level) for level in dropped]
    for v, level in picks:
        for later in levels[level:]:
            later.discard(v)
    return tuple(frozenset(level) for level in levels)
