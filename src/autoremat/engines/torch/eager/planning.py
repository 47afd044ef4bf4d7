"""Planning: the plan for a kind of input, and tighter ones where the device has less than the budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.kinds import Kind
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.sections import with_taken
from autoremat.engines.torch.eager.several import Calls, Living, plan_for
from autoremat.plan import clock
from autoremat.program import InfeasibleBudget, Plan, Program, simulate
from autoremat.run.memory import told

TIGHTER: Final = 0.9
"""The next budget, as a share of what the plan has in memory where the device ran out of it."""
_PATIENCE: Final = 3
"""A quick plan serves for so many times as long as a better one takes to be found."""


class Planner(Protocol):
    """Plans steps; knows the budget."""

    def first(self, fixed_bytes: int) -> Callable[[int], float]:
        """What a first step may take beside what is there for good, given what plain training would take by then."""

    def is_kept(self, module: str, name: str) -> bool:
        """Whether the user wants what an operator of this module and name makes kept."""

    def assembled(self, first: FirstStep) -> Program:
        """The program of a first step; operators are measured within the budget."""

    def budget_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        """The budget, where plain training has this peak."""

    def solve(
        self, program: Program, *, at_most_bytes: int | None = None, within_bytes: int | None = None,
        quick: bool = False,
    ) -> Plan:  # fmt: skip
        """A plan within the budget, and within ``at_most_bytes``; ``quick``: the first that is found.

        ``within_bytes``: in place of the budget.
        """


class Planning:
    """Makes the plans of one callable.

    Args:
        planner: that finds them.
        reporter: whom to tell.
    """

    def __init__(self, planner: Planner, reporter: Reporter) -> None:
        self._planner, self._reporter = planner, reporter
        self._at_most_bytes: int | None = None
        """What the device turned out to have, if it was less than the budget."""
        self._seconds = 0.0
        """What the last plan took that was not quick."""

    def solve(self, kind: Kind, program: Program, living: Living, *, quick: bool = False) -> None:
        """Plan a program, less what has turned out not to be repeatable."""
        if kind.differing:
            ops = list(program.ops)
            for i, op in enumerate(ops):
                if op.call in kind.differing and not op.repeatable:
                    ops[i] = replace(op, repeatable=kind.differing[op.call])
            program, kind.differing = replace(program, ops=tuple(ops)), {}
        program = with_taken(program, kind.taken)
        begin = clock.now()
        n = kind.together = max(kind.together, living.usual)
        if n > 1:
            calls = Calls(n, living.input_bytes)
            budget_bytes = self._planner.budget_bytes(program, calls.plain_peak_bytes(program))
            plan = self._plan_for_several(program, calls, budget_bytes, quick)
        else:
            plan = self._plan_for_one(program, quick, goes_on=bool(kind.taken))
            budget_bytes = plan.budget_bytes
        kind.taken = ()
        kind.follow(plan, budget_bytes, quick=quick and n == 1)
        self._reporter.counts.planned += 1
        if not quick:
            self._seconds = clock.now() - begin

    def _plan_for_one(self, program: Program, quick: bool, *, goes_on: bool) -> Plan:
        """The plan for a call that has its backward next; ``goes_on``: the smallest, where none is small enough."""
        try:
            return self._planner.solve(program, at_most_bytes=self._at_most_bytes, quick=quick)
        except InfeasibleBudget as error:
            if not goes_on:
                raise
            self._reporter.warn(
                "the first backward has shown what custom Functions and hooks take in it, and no plan keeps the step "
                f"within the budget with that (the smallest that was found takes {error.floor_bytes:,} bytes, the "
                f"budget is {error.budget_bytes:,}): it goes on under the smallest; give it more"
            )
            return self._planner.solve(program, within_bytes=error.floor_bytes, quick=quick)

    def _plan_for_several(self, program: Program, calls: Calls, most: int, quick: bool) -> Plan:
        """The plan for one of several calls before one backward."""
        most = most if self._at_most_bytes is None else min(most, self._at_most_bytes)
        plan = plan_for(
            calls, most, lambda b, first: self._planner.solve(program, within_bytes=b, quick=first), quick=quick
        )  # fmt: skip
        if (needed := calls.needed_bytes(plan)) > most:
            self._reporter.warn(
                f"{calls.n} calls wait for one backward, and no plan keeps all of them within the budget (the smallest "
                f"that was found takes {needed:,} bytes, the budget is {most:,}): go backward after fewer calls, or "
                "give them more"
            )
        return plan

    def is_due(self, kind: Kind, living: Living) -> bool:
        """Whether the plan is to be made anew of what is recorded.

        A quick plan is, once the training has gone on with it for so long that a better one costs little beside.
        """
        if kind.sections is not None:
            kind.taken, kind.sections = kind.sections.close(), None
        is_worth = clock.now() - kind.since_seconds > _PATIENCE * self._seconds
        is_known_better = bool(kind.differing or kind.taken) or kind.together < living.usual
        return is_known_better or (kind.quick and is_worth)

    def ran_out(self, kind: Kind, error: BaseException, living: Living) -> BaseException:
        """The device has less than the plan takes: say what the plan accounts for, and plan tighter next time."""
        plan = kind.plan
        with contextlib.suppress(InfeasibleBudget):
            self.tighten(kind, living)
        return told(error, plan)

    def tighten(self, kind: Kind, living: Living, reached: int | None = None) -> None:
        """Plan for what the device turned out to have: less than what the op needs that the forward has reached.

        Raises:
            InfeasibleBudget: no plan is that small; the old one stays.
        """
        plan = kind.plan
        assert plan is not None
        had = plan.peak_bytes if reached is None else _bytes_at(plan, reached)
        before, self._at_most_bytes = self._at_most_bytes, int(TIGHTER * had)
        try:
            self.solve(kind, plan.program, living)
        except InfeasibleBudget:
            self._at_most_bytes = before
            raise


def _bytes_at(plan: Plan, call: int) -> int:
    """The most that the plan has in memory while this call is first made; its peak if there is no such call."""
    ops = [i for i in plan.program.forward if plan.program.ops[i].call == call]
    resident = simulate(plan.program, plan.schedule).resident_bytes
    return max((resident[plan.schedule.order.index(i)] for i in ops), default=plan.peak_bytes)
