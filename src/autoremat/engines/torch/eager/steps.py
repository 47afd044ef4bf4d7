"""Steps of one callable: the first one of a kind of input, those under a plan, those without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from torch import Tensor

from autoremat.engines.torch.eager.check import SelfCheck
from autoremat.engines.torch.eager.first import FirstStep, NotRecorded, missing_gradient_bytes, what_is_there
from autoremat.engines.torch.eager.here import Here
from autoremat.engines.torch.eager.inputs import gradients_of
from autoremat.engines.torch.eager.kinds import Kind, Prepared
from autoremat.engines.torch.eager.planning import Planner, Planning
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.room import OfScript
from autoremat.engines.torch.eager.script import elsewhere
from autoremat.engines.torch.eager.tape import First, Reports, Tape
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.settings import RandomStates
from autoremat.engines.torch.world.gradients import gradients_found
from autoremat.engines.torch.world.memory import free_memory, is_out_of_memory, told, without_frames
from autoremat.engines.torch.world.modules import named_tensors, reachable_modules
from autoremat.engines.torch.world.parallel import Parallel, hidden
from autoremat.engines.torch.world.problems import NothingDifferentiable
from autoremat.program import InfeasibleBudget, Program
from autoremat.program.once import Reason

MAX_RETRIES: Final = 3
"""How often a forward that ran out of memory is tried again, each time under a tighter plan."""
_NO_HOOKS: Final = "don't yet support saved tensor hooks"
"""What torch.func says where hooks are active."""


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

    def first(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any], *, is_first: bool) -> Any:
        """The first step of a kind: noted, within the budget; planned at the end of its forward.

        ``is_first``: no kind has a plan so far.
        """
        kind.is_new = kind.stale = False
        parallel = kind.prepared.parallel
        check = SelfCheck(None, lambda k, why: self._differs(kind, k, why))
        step = FirstStep(
            self._fn, args, kwargs, parallel, self._room, self._planner.is_kept, self._reports(kind), check
        )  # fmt: skip
        before = RandomStates.now()
        try:
            with hidden(parallel):
                result = step.forward()
        except BaseException as error:
            if self._refuses_hooks(error):
                before.restore()
                return self._fn(*args, **kwargs)
            kind.is_new = True  # this error is why it could not be recorded; the next call may be a good one
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
        """Whether the forward cannot be noted; says so."""
        if not isinstance(error, RuntimeError) or _NO_HOOKS not in str(error):
            return False
        self._reporter.refuse(
            "the forward differentiates with torch.func, which refuses the saved-tensor hooks of autoremat "
            "(what it had done up to there has been done twice)"
        )
        return True

    def noted(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A step that is not recorded: under the online policy from its first call on."""
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
        self._waits(kind, tape)
        return result

    def _plan(self, kind: Kind, step: FirstStep, result: Any, is_first: bool) -> None:
        """Plan for a kind whose first forward is over, and go backward by the plan already."""
        known = kind.prepared.path
        try:
            step.backward(result)
            program = self._planner.assembled(step)
            kind.prepared.path = step.path()
            if kind.script is not None and kind.prepared.path == known:
                step.tape.take_plan(kind.script)
                return
            adopted = None if kind.prepared.differing else self._planning.adopted(kind.prepared, program)
            there = step.gradients(program)
            if adopted is None:
                self._solve(kind, program, there)
            elif there.keys() <= _found(adopted).keys():
                kind.prepared = adopted
            else:
                kind.prepared = self._planning.accumulating(adopted, there, self._here.living)
            self.knows(kind.prepared, step.args, step.kwargs)
            kind.steps, kind.cached = 1, step.cached(result) if known is None else None
            if kind.prepared.parallel.units:  # what their hooks take is in the program already
                step.tape.sections = None
            if kind.script is not None:
                step.tape.take_plan(kind.script)
                kind.prepared.sections = step.tape.sections
        except NothingDifferentiable:
            kind.is_new = True
            if is_first:
                raise
        except NotRecorded as error:
            self._reporter.not_recorded(error)
        self._waits(kind, step.tape)

    def knows(self, prepared: Prepared, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Note which gradients a plan has in its account, among those of these arguments and of the callable."""
        if not prepared.parallel:
            prepared.found = gradients_of(self._fn, args, kwargs, _found(prepared).keys())

    def _solve(self, kind: Kind, program: Program, there: dict[str, int]) -> None:
        for k, reason in kind.prepared.differing.items():
            self._reporter.keeps(program, k, reason)
        self._planning.solve_where(kind.prepared, program, there, self._here.living)

    def _waits(self, kind: Kind, tape: Tape) -> None:
        """A forward is over, and its graph waits for its backward."""
        beside = 0 if kind.script is None else kind.script.waiting_bytes
        held, plain = tape.held_bytes
        self._here.living.add(tape.life(), held + beside, plain + beside, self._here.inputs)

    def _room(self, fixed_bytes: int) -> Callable[[int], float]:
        """What a first step may take beside what is there for good, and beside the graphs of earlier calls."""
        share, load = self._planner.first(fixed_bytes), self._here.load
        return lambda plain_bytes: share(plain_bytes + load.plain_bytes) - load.held_bytes

    def planned(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The forward under the plan, under tighter ones where the device runs out of memory."""
        for attempt in range(MAX_RETRIES + 1):
            tape, plan, before = self._tape(kind), kind.plan, RandomStates.now()
            try:
                with hidden(kind.prepared.parallel), tape.forward():
                    result = self._fn(*args, **kwargs)
                self._through(kind, tape)
                self._waits(kind, tape)
                return result
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                refusal = without_frames(error)
            is_safe = (
                not kind.prepared.parallel
                and not tape.has_effects
                and not any(map(tape.has_made, _outlasting(self._fn, args, kwargs)))
            )
            reached = tape.n_calls - 1 if tape.policy.is_following else None
            del tape  # with the error's frames, all that the forward has made: now there is room to plan
            free_memory()
            try:
                self._planning.tighten(kind.prepared, self._here.living, reached)
            except InfeasibleBudget as infeasible:
                raise told(refusal, plan) from infeasible
            if not is_safe or attempt == MAX_RETRIES:
                raise told(refusal, plan) from refusal
            before.restore()
            self._reporter.counts.retries += 1
        raise AssertionError("unreachable")

    def _reports(self, kind: Kind) -> Reports:
        return Reports(
            lambda reason, growth: self._deviated(kind, reason, growth),
            self._reporter.rerun,
            lambda error: self._planning.ran_out(kind.prepared, error, self._here.living),
        )

    def _tape(self, kind: Kind) -> Tape:
        assert kind.script is not None
        check = None
        if not kind.prepared.checked:
            check = SelfCheck(kind.script.twice, lambda k, why: self._differs(kind, k, why))
        assert kind.plan is not None
        others_bytes = self._here.load.held_bytes
        tape = Tape(
            kind.script, reports=self._reports(kind), check=check, others_bytes=others_bytes, wary=kind.is_wary
        )  # fmt: skip
        if kind.straying.is_habit:
            tape.note_all(kind.straying.growth)
            self._reporter.counts.deviations += 1
        elif others_bytes and kind.plan.peak_bytes + others_bytes > (kind.script.budget_bytes or math.inf):
            tape.note_all()
        return tape

    def _through(self, kind: Kind, tape: Tape) -> None:
        """A forward has come to its end."""
        kind.step_is_over(tape.way)
        if not tape.policy.is_following and tape.compiled:
            kind.stale = True

    def plain(self, kind: Kind | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The forward without checkpointing."""
        try:
            return self._fn(*args, **kwargs)
        except BaseException as error:
            if kind is not None and kind.plan is not None and is_out_of_memory(error):
                raise self._planning.ran_out(kind.prepared, error, self._here.living) from error
            if kind is not None and kind.plan is None:
                kind.is_new = True  # this error is why it could not be recorded; the next call may be a good one
            raise

    def _differs(self, kind: Kind, k: int, reason: Reason) -> None:
        """A call has turned out to give something else when it is made again."""
        kind.prepared.differing[k] = reason
        if kind.plan is not None:  # else it is told once the step has been recorded
            self._reporter.keeps(kind.plan.program, k, reason)

    def _deviated(self, kind: Kind, reason: str, growth: float) -> None:
        self._reporter.counts.deviations += 1
        goes_on = kind.left(growth)
        how = _off_the_path(kind.prepared.parallel)
        self._reporter.warn(
            f"a step left the path that was recorded ({reason}); it goes on {how}; its "
            "gradients are exact. When steps leave it for good, the next one is recorded anew"
        )
        if goes_on:
            self._reporter.warn(
                "the forward leaves its recorded path again and again for the same kind of input "
                f"({kind.straying.deviations} times so far: it depends on the data or on state outside); such steps "
                "run under the online policy"
            )


def _found(prepared: Prepared) -> dict[str, int]:
    """Bytes of the gradients that a plan has in its account from the start, by name of the parameter."""
    return {} if prepared.plan is None else gradients_found(prepared.plan.program)


def _off_the_path(parallel: Parallel) -> str:
    if parallel.units:
        return "and keeps everything, because parameters of fully_shard may be gone when a call is made again"
    return "under the online policy, which lets go of what is cheapest to compute again"


def _outlasting(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Parameters, buffers and gradients: if a forward made one of them, running it once more would do so again."""
    for _, _, tensor in named_tensors(reachable_modules(fn, args, kwargs)):
        yield tensor
        if is_leaf(tensor) and tensor.grad is not None:
            yield tensor.grad
