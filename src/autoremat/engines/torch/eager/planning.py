"""Makes plans for kinds of input, tighter ones where memory runs out."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Protocol

from autoremat.engines.torch.eager.away import NOWHERE, Away, Nowhere, Store
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.kinds import Prepared
from autoremat.engines.torch.eager.path import Call
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.sections import with_taken
from autoremat.engines.torch.eager.several import Calls, Living, plan_for
from autoremat.engines.torch.world.gradients import gradients_found, gradients_left, with_gradients
from autoremat.engines.torch.world.memory import told
from autoremat.planner import beside
from autoremat.planner.beside import SearchFailed, Wanted
from autoremat.planner.growth import grown, grown_number, is_same, shrunk, shrunk_number
from autoremat.planner.refusals import with_arrivals
from autoremat.planner.solving import solve, without_link
from autoremat.program import InfeasibleBudget, Plan, Program, Value, simulate

_LOG = logging.getLogger("autoremat")
TIGHTER: Final = 0.9
"""The next budget, as a share of what the device refused.

The device refused what the plan has in memory at that moment.
"""
_QUICK: Final = 0.01
"""Share of a plan's time that one may take while training waits.

It is a plan for another kind of input.
"""


class Planner(Protocol):
    """Plans steps; knows the budget.

    Attributes:
        time_limit_seconds: the longest that a plan may take.
        given: the user's own plan, made of the largest input.
        near: the best plan that is known of a similar step; the user's own at first.
    """

    time_limit_seconds: float
    given: Plan | None
    near: Plan | None

    def first(self, fixed_bytes: int) -> Callable[[int], float]:
        """Return what a first step may take, given plain training's bytes.

        What is always there does not count.
        """

    def is_kept(self, module: str, name: str) -> bool:
        """Tell whether the user wants this module's operator kept."""

    def assembled(self, first: FirstStep) -> Program:
        """Make a first step's program, operators measured within the budget."""

    def budget_bytes(self, program: Program, plain_peak_bytes: int, *, anew: bool = False) -> int:
        """Return the budget, where plain training has this peak.

        A share of a peak is settled by the first plan; ``anew``: by a plan that knows more than that one.
        """

    def share_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        """Return the budget as if this were the first plan."""

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        """Plan within a budget, with work for so many seconds.

        With none given, it is the first plan found, without a floor; what ``near`` recomputes is tried, too.
        """

    def wanted(self, program: Program, budget: int, seconds: float) -> Wanted:
        """Describe the same plan, to be searched for elsewhere."""

    def store(self, nbytes: int) -> tuple[Store, str] | None:
        """Open a step's part of the tier, if there is one."""


_NOT_FOR_THIS_STEP = (
    "the plan that was given is not for this step (it was made of another model, or of a smaller input, where "
    "autoremat.plan wants the largest, or the model takes another path on real numbers): the step is planned by "
    "itself, within the same budget, from what the given plan recomputes"
)


class Planning:
    """Makes the plans of one callable.

    Args:
        planner: that finds them.
        reporter: whom to tell.
    """

    def __init__(self, planner: Planner, reporter: Reporter) -> None:
        self._planner, self._reporter = planner, reporter
        self._at_most_bytes: int | None = None
        """What the device turned out to have, if below the budget."""
        self._first: Program | None = None
        """The first planned program; errors name what has come since."""

    def solve(self, step: Prepared, program: Program, living: Living, seconds: float | None = None) -> None:
        """Plan a program with what was found since; no ``seconds``: at once."""
        if step.differing:
            ops = list(program.ops)
            for i, op in enumerate(ops):
                if op.call in step.differing and not op.once:
                    ops[i] = replace(op, **step.differing[op.call]._asdict())
            program = replace(program, ops=tuple(ops))
        recorded = with_taken(program, step.taken)
        program = with_gradients(recorded, step.gradients)
        try:
            self._solve(step, program, living, seconds)
        except InfeasibleBudget as error:
            raise error if self._first is None else with_arrivals(error, self._first, program) from None
        self._first = self._first or program
        step.program, step.differing, step.taken = recorded, {}, ()
        self._reporter.counts.planned += 1

    def _solve(self, step: Prepared, program: Program, living: Living, seconds: float | None) -> None:
        """Plan a program of which all is known."""
        n = step.together = max(step.together, living.usual)
        tried_seconds = self.quick_seconds if seconds is None else seconds
        calls = Calls(n, living.input_bytes)
        budget_bytes = self._planner.budget_bytes(
            program, calls.plain_peak_bytes(program), anew=n > 1 or bool(step.taken)
        )  # fmt: skip
        if n > 1:
            plan = self._plan_for_several(program, calls, budget_bytes, tried_seconds)
        else:
            plan = self._plan_for_one(program, budget_bytes, seconds, goes_on=bool(step.taken))
            budget_bytes = plan.budget_bytes
        step.search = None
        step.follow(plan, budget_bytes, tried_seconds=tried_seconds)

    def solve_where(
        self, step: Prepared, program: Program, there: Mapping[str, int], living: Living, seconds: float | None = None
    ) -> None:  # fmt: skip
        """Plan a program for steps that find these gradients.

        If possible, plan as though all that the backward makes were there: that serves whatever else a step finds.
        """
        left = gradients_left(program)
        if there:
            step.gradients = left | dict(there)
            with contextlib.suppress(InfeasibleBudget):
                self.solve(step, program, living, seconds)
                return
        step.gradients = dict(there)
        self.solve(step, program, living, seconds)

    def accumulating(self, step: Prepared, there: Mapping[str, int], living: Living) -> Prepared:
        """Plan the same step where these gradients are there.

        Raises:
            InfeasibleBudget: no plan keeps it within the budget with them.
        """
        step.close_sections()
        assert step.program is not None
        found = Prepared(
            path=step.path, parallel=step.parallel, differing=dict(step.differing), taken=step.taken,
            together=step.together, is_of_the_largest=step.is_of_the_largest, cost_seconds=step.cost_seconds,
        )  # fmt: skip
        self.solve_where(found, step.program, there, living)
        return found

    @property
    def quick_seconds(self) -> float:
        """What a plan may take while the training waits."""
        return _QUICK * self._planner.time_limit_seconds

    def adopted(self, step: Prepared, program: Program) -> Prepared | None:
        """Return the user's plan, if it is of these calls, nothing smaller."""
        plan, path = self._planner.given, step.path
        if plan is None or path is None:
            return None
        left = gradients_left(program)
        program = with_gradients(
            program, {n: left.get(n, nbytes) for n, nbytes in gradients_found(plan.program).items()}
        )
        if not is_same(program, plan.program) or any(map(_is_larger, program.values, plan.program.values)):
            self._reporter.warn(_NOT_FOR_THIS_STEP)
            return None
        if simulate(replace(program, link=plan.program.link), plan.schedule).peak_bytes > plan.budget_bytes:
            return None  # the plan was made from estimates, which miss temporaries of kernels
        limits = [_limit(call, program, plan.program) for call in path.calls]
        found = Prepared(
            path=path.with_numels(limits), parallel=step.parallel, is_of_the_largest=True, program=plan.program
        )  # fmt: skip
        found.follow(plan, plan.budget_bytes, tried_seconds=self._planner.time_limit_seconds)
        self._first = self._first or plan.program
        return found

    def renewed(self, step: Prepared, living: Living) -> bool:
        """Tell whether the plan was just replaced by a better one.

        The new plan knows more, or was found by a search beside the training, which begins once a plan without any time
        above the bound would have saved as much as the search may take. The next call follows it.
        """
        plan = step.plan
        assert plan is not None
        assert step.program is not None
        step.close_sections()
        if step.differing or step.taken or step.together < living.usual:
            self.solve(step, step.program, living)
            return True
        seconds = step.worth_seconds(self._planner.time_limit_seconds)
        if step.search is None and step.tried_seconds < seconds < step.lost_by_now:
            step.search = beside.begun(self._planner.wanted(plan.program, plan.budget_bytes, seconds))
            if step.search is not None:
                _LOG.info("looking for a better plan, some %.1f s; the training goes on", seconds)
        return step.search is not None and step.search.is_over() and self._is_better(step, step.search, living)

    def _is_better(self, step: Prepared, search: beside.Search, living: Living) -> bool:
        """Follow what a finished search found, if it is better."""
        plan, step.search = step.plan, None
        assert plan is not None
        step.tried_seconds, step.used_seconds = step.worth_seconds(self._planner.time_limit_seconds), 0.0
        try:
            found = search.plan()
        except SearchFailed as error:
            step.tried_seconds = self._planner.time_limit_seconds
            self._reporter.tell(f"no better plan could be looked for ({error}); the training goes on as it is")
            return False
        calls = Calls(step.together, living.input_bytes)
        if found is None or found.overhead >= plan.overhead or calls.needed_bytes(found) > calls.needed_bytes(plan):
            _LOG.info("no better plan has been found")
            if found is not None:  # at least the search tells how good the present plan is
                lowest = min(found.floor_bytes, plan.floor_bytes)
                step.plan = replace(plan, lower_bound=max(found.lower_bound, plan.lower_bound), floor_bytes=lowest)
            return False
        _LOG.info("a better plan has been found: %.1f %% extra time", 100 * found.overhead)
        step.follow(found, step.budget_bytes, tried_seconds=step.tried_seconds)
        self._planner.near = found
        self._reporter.counts.planned += 1
        return True

    def _plan_for_one(self, program: Program, budget_bytes: int, seconds: float | None, *, goes_on: bool) -> Plan:
        """Plan one call; ``goes_on``: take the smallest plan if none fits."""
        most = budget_bytes if self._at_most_bytes is None else min(budget_bytes, self._at_most_bytes)
        try:
            return self._planner.solve(program, most, seconds)
        except InfeasibleBudget as error:
            larger = self._planner.share_bytes(program, simulate(program).peak_bytes)
            if goes_on:
                self._reporter.warn(
                    "the first backward has shown what custom Functions and hooks take in it, and no plan keeps the "
                    f"step within the budget with that (the smallest that was found takes {error.floor_bytes:,} bytes, "
                    f"the budget is {error.budget_bytes:,}): it goes on under the smallest; give it more"
                )
                return self._planner.solve(program, error.floor_bytes, seconds)
            if larger <= most or self._at_most_bytes is not None:
                raise
            self._reporter.tell(
                f"no plan keeps this step within what the share of the plain peak came to at the first plan ({most:,} "
                f"bytes; the smallest that was found takes {error.floor_bytes:,}): it has that share of its own plain "
                f"peak, {larger:,} bytes. Call with the largest input first, or give a number of bytes"
            )
            return self._planner.solve(program, larger, seconds)

    def _plan_for_several(self, program: Program, calls: Calls, most: int, seconds: float) -> Plan:
        """Plan one of several calls before one backward."""
        most = most if self._at_most_bytes is None else min(most, self._at_most_bytes)
        plan = plan_for(
            calls, most, lambda b, at_once: self._planner.solve(program, b, self.quick_seconds if at_once else seconds)
        )  # fmt: skip
        if (needed := calls.needed_bytes(plan)) > most:
            self._reporter.warn(
                f"{calls.n} calls wait for one backward, and no plan keeps all of them within the budget (the smallest "
                f"that was found takes {needed:,} bytes, the budget is {most:,}): go backward after fewer calls, or "
                "give them more"
            )
        return plan

    def foreseen(self, small: Prepared, large: Prepared, between: float, further: float) -> Prepared | None:
        """Plan for ``further`` times the sizes, if two recordings tell their growth."""
        if small.program is None or large.program is None or small.path is None or large.path is None:
            return None
        change, number = (grown, grown_number) if further > 1 else (shrunk, shrunk_number)
        program = change(small.program, large.program, between, further)
        if program is None or large.plan is None or large.together > 1 or not small.path.is_like(large.path):
            return None
        both = zip(small.path.numels(), large.path.numels(), strict=True)
        path = large.path.with_numels([number(a, b, between, further) for a, b in both])
        found = Prepared(
            path=path, parallel=large.parallel, cost_seconds=large.cost_seconds, program=program,
            gradients=large.gradients, found=large.found,
        )  # fmt: skip
        try:
            plan = self._planner.solve(with_gradients(program, large.gradients), large.plan.budget_bytes)
        except InfeasibleBudget:
            return None
        found.follow(plan, plan.budget_bytes, tried_seconds=self.quick_seconds)
        self._reporter.counts.planned += 1
        return found

    def ran_out(self, step: Prepared, error: BaseException, living: Living) -> BaseException:
        """Explain a plan's refused memory, and plan tighter next time."""
        plan = step.plan
        with contextlib.suppress(InfeasibleBudget):
            self.tighten(step, living)
        return told(error, plan)

    def tighten(self, step: Prepared, living: Living, reached: int | None = None) -> None:
        """Plan for less than what the op reached in the forward needs.

        Raises:
            InfeasibleBudget: no plan is that small; the old one stays.
        """
        plan, program = step.plan, step.program
        assert plan is not None
        assert program is not None
        had = plan.peak_bytes if reached is None else _bytes_at(plan, reached)
        before, self._at_most_bytes = self._at_most_bytes, int(TIGHTER * had)
        try:
            self.solve(step, program, living)
        except InfeasibleBudget:
            self._at_most_bytes = before
            raise


def first_script(planner: Planner, reporter: Reporter, seconds: float, step: Prepared) -> Script:
    """Return what the first backward goes by.

    Its forward has moved nothing, and what it has dropped can only be recomputed. So it is recomputation alone, if
    that keeps the budget; else the plan, which takes more than the budget this once.
    """
    script, plan = step.script, step.plan
    assert script is not None
    assert plan is not None
    if not script.away:
        return script
    wanted = planner.wanted(without_link(plan.program), plan.budget_bytes, seconds)
    try:
        alone = solve(
            wanted.program, wanted.budget_bytes, wishes=wanted.wishes, time_limit_seconds=wanted.seconds, first=True
        )
    except InfeasibleBudget as error:
        reporter.tell(
            "the first step of a kind of input is not planned in its forward and moves nothing there to the tier; "
            f"without that, no plan keeps it within the budget (the smallest that was found takes "
            f"{error.floor_bytes:,} bytes, the budget is {error.budget_bytes:,}): this once, the step takes more"
        )
        return script
    return step.script_of(alone, step.budget_bytes)


def away_for(planning: Planning, script: Script) -> Nowhere:
    """Return what keeps the values that one step moves away.

    Raises:
        OffloadFailed: the tier has no room for them.
    """
    found = planning._planner.store(script.sent_bytes) if script.away else None
    return NOWHERE if found is None else Away(*found, planning._reporter.warn)


def _bytes_at(plan: Plan, call: int) -> int:
    """Return the most bytes while a call first runs under the plan.

    It is the plan's peak if there is no such call.
    """
    ops = [i for i in plan.program.forward if plan.program.ops[i].call == call]
    resident = simulate(plan.program, plan.schedule).resident_bytes
    return max((resident[plan.schedule.order.index(i)] for i in ops), default=plan.peak_bytes)


def _is_larger(value: Value, planned: Value) -> bool:
    return value.nbytes > planned.nbytes


def _limit(call: Call, program: Program, largest: Program) -> int:
    """Return how many elements a call may give under the largest plan."""
    made = [v for v, value in enumerate(program.values) if not value.fixed]
    ratios = [largest.values[made[v]].nbytes / max(1, program.values[made[v]].nbytes) for _, v in call.results]
    return math.ceil(call.numel * max(ratios, default=math.inf)) if ratios else sys.maxsize
