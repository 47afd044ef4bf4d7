"""Several calls before one backward: they share the budget.

Contrastive views, carried state and chunks of a sequence are examples: the graphs of earlier calls still exist when a
call comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, Timeline, simulate

_FEW: Final = 2
_TRIES: Final = 8
"""Budgets of one call that are tried, each halving the range."""


@dataclass(frozen=True)
class Load:
    """The graphs that exist when a call comes.

    Attributes:
        n: how many.
        held_bytes: what they hold, with the inputs of their calls.
        plain_bytes: what they would hold in plain training.
    """

    n: int = 0
    held_bytes: int = 0
    plain_bytes: int = 0


@dataclass(frozen=True)
class _Graph:
    is_alive: Callable[[], bool]
    held_bytes: int
    plain_bytes: int
    inputs: Mapping[int, int]
    """Bytes of the input's memory, by address."""


class Living:
    """The graphs of earlier calls whose backward is still to come."""

    def __init__(self) -> None:
        self._graphs: list[_Graph] = []
        self._before, self._last, self._most = 1, 1, 1
        """Calls that waited in the last two steps, and wait now."""
        self.input_bytes = 0
        """Bytes of a waiting call's input that no later call shares."""

    @property
    def usual(self) -> int:
        """How many calls usually wait for one backward.

        Two only if that happened twice in a row, lest an error in a backward be taken for a habit.
        """
        return self._last if self._last > _FEW else min(self._before, self._last)

    def add(self, is_alive: Callable[[], bool], held_bytes: int, plain_bytes: int, inputs: Mapping[int, int]) -> None:
        """Add the graph of a forward that is over.

        Args:
            is_alive: tells whether the graph still waits.
            held_bytes: what it holds.
            plain_bytes: what it would hold in plain training.
            inputs: bytes of the input, by address.
        """
        self._graphs.append(_Graph(is_alive, held_bytes, plain_bytes, inputs))

    def next_call(self, inputs: Mapping[int, int]) -> Load:
        """Return what exists when the next call comes, with this input."""
        self._graphs = graphs = [g for g in self._graphs if g.is_alive()]
        if not graphs:
            self._before, self._last, self._most = self._last, self._most, 1
            return Load()
        self._most = max(self._most, len(graphs) + 1)
        others = {k: v for g in graphs for k, v in g.inputs.items() if k not in inputs}
        beside = sum(others.values())
        self.input_bytes = max(self.input_bytes, beside // len(graphs))
        held, plain = sum(g.held_bytes for g in graphs), sum(g.plain_bytes for g in graphs)
        return Load(len(graphs), held + beside, plain + beside)


def held_bytes(program: Program, schedule: Schedule | None = None, timeline: Timeline | None = None) -> int:
    """Return what a step holds between forward and backward.

    What is always there does not count. ``timeline``: of this schedule, where it is known already.
    """
    schedule = schedule or Schedule.plain(program)
    at = schedule.order.index(max(program.forward, default=-1))
    later = (timeline or simulate(program, schedule)).resident_bytes[at + 1 : at + 2]
    return max(later, default=program.fixed_bytes) - program.fixed_bytes


def waiting_bytes(program: Program) -> int:
    """Estimate what a waiting call adds during another call's backward.

    The gradient of its output exists before anybody needs it, and the loss has made something of that output.
    """
    last = max(program.forward, default=-1)
    outputs = (v for v, p in enumerate(program.producer) if 0 <= p <= last < program.hold[v])
    return 2 * sum(program.values[v].nbytes for v in outputs)


@dataclass(frozen=True)
class Calls:
    """Calls before one backward.

    Attributes:
        n: how many.
        input_bytes: bytes of the input of each waiting call.
    """

    n: int
    input_bytes: int = 0

    def needed_bytes(self, plan: Plan) -> int:
        """Return their peak, each under this plan."""
        return plan.peak_bytes + self._beside(plan.program, plan.schedule)

    def plain_peak_bytes(self, program: Program) -> int:
        """Return their peak in plain training."""
        return simulate(program).peak_bytes + self._beside(program, None)

    def _beside(self, program: Program, schedule: Schedule | None) -> int:
        return (self.n - 1) * (held_bytes(program, schedule) + waiting_bytes(program) + self.input_bytes)


def plan_for(calls: Calls, budget_bytes: int, solve: Callable[[int, bool], Plan]) -> Plan:
    """Plan one of several calls before one backward that share a budget.

    What a plan holds between forward and backward counts for every call, its peak for the last one. A smaller budget
    for a call makes both smaller, so a bisection finds the largest with which all of them fit.

    Args:
        calls: before one backward.
        budget_bytes: of all of them.
        solve: makes a plan within a budget; its second argument: whether the plan is wanted at once.

    Returns:
        The plan; where nothing fits, the smallest, which the caller can tell by ``Calls.needed_bytes``.
    """
    plan = solve(budget_bytes, True)
    if calls.needed_bytes(plan) <= budget_bytes:
        return plan
    low, high, best = plan.floor_bytes, budget_bytes, None
    for _ in range(_TRIES):
        middle = (low + high) // 2
        try:
            plan = solve(middle, True)
        except InfeasibleBudget:
            low = middle
            continue
        if calls.needed_bytes(plan) <= budget_bytes:
            low, best = middle, plan
        else:
            high = middle
    if best is None:
        return _smallest(low, high, solve)
    better = solve(best.budget_bytes, False)
    return better if calls.needed_bytes(better) <= budget_bytes else best


def _smallest(low: int, high: int, solve: Callable[[int, bool], Plan]) -> Plan:
    try:
        return solve(low, True)
    except InfeasibleBudget as error:
        return solve(max(high, error.floor_bytes), True)
