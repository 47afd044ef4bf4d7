"""Steps of one callable: first ones, noted ones, and plain ones.

Noted steps go by the account of another kind of input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from autoremat.engines.torch.eager.check import SelfCheck
from autoremat.engines.torch.eager.first import FirstStep, NotRecorded, missing_gradient_bytes, what_is_there
from autoremat.engines.torch.eager.here import Here
from autoremat.engines.torch.eager.inputs import gradients_of
from autoremat.engines.torch.eager.kinds import Kind, Prepared
from autoremat.engines.torch.eager.outgrown import still_larger, with_room
from autoremat.engines.torch.eager.planning import Planner, Planning, away_for, first_script
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.room import OfScript
from autoremat.engines.torch.eager.script import Script, elsewhere
from autoremat.engines.torch.eager.tape import First, Reports, Tape
from autoremat.engines.torch.eager.under_plan import UnderPlan
from autoremat.engines.torch.operators.settings import RandomStates
from autoremat.engines.torch.world.gradients import gradients_found
from autoremat.engines.torch.world.memory import is_out_of_memory
from autoremat.engines.torch.world.modules import reachable_modules
from autoremat.engines.torch.world.parallel import hidden
from autoremat.engines.torch.world.problems import NothingDifferentiable
from autoremat.program import Program

_NO_HOOKS: Final = "don't yet support saved tensor hooks"
"""Part of the error of torch.func where hooks are active."""


class Steps:
    """Runs the forwards of a callable.

    Args:
        fn: the callable, without autoremat.
        planner: knows the budget.
        planning: makes plans.
        reporter: whom to tell.
        here: what belongs to the thread that calls.
    """

    def __init__(
        self, fn: Callable[..., Any], planner: Planner, planning: Planning, reporter: Reporter, here: Here
    ) -> None:  # fmt: skip
        self._fn, self._planner, self._planning, self._reporter, self._here = fn, planner, planning, reporter, here
        self.under_plan = UnderPlan(fn, planning, reporter, here)
        """Runs the forwards that have a plan."""

    def first(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any], *, is_first: bool) -> Any:
        """Run a kind's first step: noted, and planned after its forward.

        Args:
            kind: of the input.
            args: positional arguments.
            kwargs: keyword arguments.
            is_first: no kind has a plan so far.
        """
        kind.is_new = kind.stale = False
        parallel = kind.prepared.parallel
        check = SelfCheck(None, lambda k, why: self.under_plan.differs(kind, k, why))
        step = FirstStep(
            self._fn, args, kwargs, parallel, self._room, self._planner.is_kept, self.under_plan.reports(kind), check
        )  # fmt: skip
        before = RandomStates.now()
        try:
            with hidden(parallel):
                result = step.forward()
        except BaseException as error:
            if self._refuses_hooks(error):
                before.restore()
                return self._fn(*args, **kwargs)
            kind.is_new = True  # this call failed, so nothing was recorded; the next one may succeed
            raise
        if step.compiled:
            self._reporter.refuse(
                f"{step.compiled} is compiled by torch.compile, and autoremat cannot see into compiled code; "
                "leave torch.compile out there, or checkpoint only what is not compiled"
            )
            return result
        self._plan(kind, step, result, is_first)
        return result

    def _refuses_hooks(self, error: BaseException) -> bool:
        """Tell, and say, whether the forward cannot be noted."""
        if not isinstance(error, RuntimeError) or _NO_HOOKS not in str(error):
            return False
        self._reporter.refuse(
            "the forward differentiates with torch.func, which refuses the saved-tensor hooks of autoremat "
            "(what it had done up to there has been done twice)"
        )
        return True

    def noted(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a step unrecorded, under the online policy from the start."""
        relative, parallel, modules = kind.relative, kind.prepared.parallel, reachable_modules(self._fn, args, kwargs)
        assert relative is not None
        assert relative.script is not None
        storages, fixed_bytes = what_is_there(modules, args, kwargs, parallel)
        script = elsewhere(relative.script, self._room(fixed_bytes)(0), missing_gradient_bytes(modules))
        growth = max(relative.straying.growth, relative.share * kind.sizes.share_of(relative.sizes))
        tape = Tape(
            First(OfScript(script, growth=growth), None, storages, self._planner.is_kept),
            Reports(rerun=self._reporter.rerun),
        )  # fmt: skip
        self._reporter.counts.deviations += 1
        before = RandomStates.now()
        try:
            with hidden(parallel), tape.forward():
                result = self._fn(*args, **kwargs)
        except RuntimeError as error:
            if not self._refuses_hooks(error):
                raise
            before.restore()
            return self._fn(*args, **kwargs)
        self.under_plan.waits(kind, tape)
        return result

    def _plan(self, kind: Kind, step: FirstStep, result: Any, is_first: bool) -> None:
        """Plan for a kind after its first forward; its backward follows already."""
        known = kind.prepared.path
        try:
            step.backward(result)
            program = self._planner.assembled(step)
            kind.prepared.path = step.path()
            if kind.script is not None and kind.prepared.path == known:
                self._follow(step, self._first_script(kind))
                return
            adopted = None if kind.prepared.differing else self._planning.adopted(kind.prepared, program)
            if adopted is None and kind.outgrown is not None:
                adopted = still_larger(self._planning, kind.prepared, program, *kind.outgrown)
            there = step.gradients(program)
            if adopted is None:
                self._solve(kind, program, there)
                if kind.outgrown is not None:
                    kind.prepared = with_room(self._planning, kind.prepared, *kind.outgrown)
            elif there.keys() <= _found(adopted).keys():
                kind.prepared = adopted
            else:
                kind.prepared = self._planning.accumulating(adopted, there, self._here.living)
            self.knows(kind.prepared, step.args, step.kwargs)
            kind.steps, kind.cached = 1, step.cached(result) if known is None else None
            if kind.prepared.parallel.units:  # the program has what fully_shard's hooks take already
                step.tape.sections = None
            if kind.script is not None:
                self._follow(step, self._first_script(kind))
                kind.prepared.sections = step.tape.sections
        except NothingDifferentiable:
            kind.is_new = True
            if is_first:
                raise
        except NotRecorded as error:
            self._reporter.not_recorded(error)
        finally:
            step.let_go()
        self.under_plan.waits(kind, step.tape)

    def _first_script(self, kind: Kind) -> Script:
        """Return what the first backward of a kind goes by."""
        return first_script(self._planner, self._reporter, self._planning.quick_seconds, kind.prepared)

    def _follow(self, step: FirstStep, script: Script) -> None:
        """Go on by a plan; what it has away by now moves."""
        ledger = step.tape.ledger
        ledger.away = away_for(self._planning, script)
        step.tape.take_plan(script, step.living())
        ledger.away.take(ledger, script.away)

    def knows(self, prepared: Prepared, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note which gradients a plan accounts for, among existing ones."""
        if not prepared.parallel:
            prepared.found = gradients_of(self._fn, args, kwargs, _found(prepared).keys())

    def _solve(self, kind: Kind, program: Program, there: dict[str, int]) -> None:
        for k, reason in kind.prepared.differing.items():
            self._reporter.keeps(program, k, reason)
        self._planning.solve_where(kind.prepared, program, there, self._here.living)

    def _room(self, fixed_bytes: int) -> Callable[[int], float]:
        """Return what a first step may take besides what already exists.

        The graphs of earlier calls count, too.
        """
        share, load = self._planner.first(fixed_bytes), self._here.load
        return lambda plain_bytes: share(plain_bytes + load.plain_bytes) - load.held_bytes

    def plain(self, kind: Kind | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the forward without checkpointing."""
        try:
            return self._fn(*args, **kwargs)
        except BaseException as error:
            if kind is not None and kind.plan is not None and is_out_of_memory(error):
                raise self._planning.ran_out(kind.prepared, error, self._here.living) from error
            if kind is not None and kind.plan is None:
                kind.is_new = True  # this call failed, so nothing was recorded; the next one may succeed
            raise


def _found(prepared: Prepared) -> dict[str, int]:
    """Return the bytes of gradients in a plan's account, by name."""
    return {} if prepared.plan is None else gradients_found(prepared.plan.program)
