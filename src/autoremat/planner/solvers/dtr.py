"""DTR, simulated: evict online, by the past alone.

Kirisame et al. 2021, "Dynamic Tensor Rematerialization", the heuristic h_DTR: when memory is full, the tensor with the
smallest ``cost / (bytes * staleness)`` leaves, where the cost is that of its op and of its evicted neighbourhood (all
that is gone and would have to be made for it, or that would need it to be made), and the staleness is the time since
its last access. What no reference is left to leaves first (eager eviction). Nothing here looks ahead: a value may leave
once the forward is done with it, and is known to be dead once its last reader has run. Scores are computed anew after a
couple of evictions rather than at each.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from autoremat.planner import clock
from autoremat.planner.search.chain import Runs
from autoremat.planner.search.evict import Course, Executor, Rules, course_of
from autoremat.planner.search.tables import NEVER, tables_of
from autoremat.planner.search.unrolled import merge
from autoremat.program import Program, Schedule, simulate

_FARTHEST = 100
"""How many ops of a neighbourhood are counted."""

_LIMITS = 12
"""How many limits up to the plain peak are tried, as far as they are above the budget, where DTR runs out of memory or
thrashes. They do not depend on the budget: so what it reaches for a budget, it reaches for that peak, too."""


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Run DTR under the budget, or under a higher limit.

    Where it fails, under the lowest of a few higher limits. O(evictions * values).

    Near the floor it thrashes for minutes; past the ``deadline`` (on ``clock.worked``) it fails.
    """
    course, plain = course_of(tables_of(program)), simulate(program).peak_bytes
    least = program.fixed_bytes
    limits = [budget_bytes, *(least + (plain - least) * k // _LIMITS for k in range(1, _LIMITS))]
    for limit in limits:
        if not budget_bytes <= limit < plain:
            continue
        runs = dtr_runs(course, limit, deadline=deadline)
        schedule = None if runs is None else Schedule.from_order(program, merge(course.tables, runs))
        if schedule is not None and simulate(program, schedule).peak_bytes <= limit:  # its own account is an estimate
            return schedule
    return Schedule.plain(program)


def dtr_runs(course: Course, limit_bytes: int, *, deadline: float = inf) -> Runs | None:
    """List DTR's reruns under a limit, if it gets through.

    None when an op does not fit, or nothing but recomputation happens in time.
    """
    executor = _Online(course, Rules(limit_bytes, limit_bytes, most_bytes=limit_bytes))
    for t in range(len(course.tables.ops)):
        executor.step(t)
        if executor.failed or clock.is_over(deadline):
            return None
    return executor.runs


class _Online(Executor):
    """The evicting executor with DTR's score, which knows the past only."""

    def __init__(self, course: Course, rules: Rules) -> None:
        super().__init__(course, rules)
        self._accessed = [0] * len(self.tables.values)
        self._clock = 0

    def step(self, t: int) -> None:
        super().step(t)
        self._access(t)

    def _take_in(self, i: int, last_reader: dict[int, int], passing: dict[int, int]) -> None:
        super()._take_in(i, last_reader, passing)
        self._access(i)

    def _access(self, op: int) -> None:
        self._clock += 1
        for v in (*self.tables.reads[op], *self.tables.ops[op].writes):
            self._accessed[v] = self._clock

    def _uses_as_source(self) -> dict[int, int]:
        return {}

    def _score(self, value: int) -> float:
        if self.tables.first_start(value, self.now) >= NEVER:
            return 0.0
        staleness = self._clock - self._accessed[value] + 1
        return (self._cost(value) + self._cost_of_gone_users(value)) / (self.size[value] * staleness)

    def _cost_of_gone_users(self, value: int) -> float:
        """Add up the seconds of users that are gone, too.

        They have run, and would need the value to be made again.
        """
        seconds, seen, stack = 0.0, set[int](), [value]
        while stack and len(seen) < _FARTHEST:
            for i, w in self._gone_users(stack.pop()):
                if i not in seen:
                    seen.add(i)
                    seconds += self.tables.seconds[i]
                stack.append(w)
        return seconds

    def _gone_users(self, value: int) -> Iterator[tuple[int, int]]:
        for i in self.tables.early_readers[value]:
            if i < self.now:
                yield from ((i, w) for w in self.tables.ops[i].writes if not self._at_hand(w))
