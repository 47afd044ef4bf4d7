"""Runs forwards under a plan, tighter ones where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from time import thread_time
from typing import Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.check import SelfCheck
from autoremat.engines.torch.eager.here import Here
from autoremat.engines.torch.eager.kinds import Kind
from autoremat.engines.torch.eager.planning import Planning, away_for
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.tape import Reports, Tape
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.settings import RandomStates
from autoremat.engines.torch.world.memory import free_memory, is_out_of_memory, told, without_frames
from autoremat.engines.torch.world.modules import named_tensors, reachable_modules
from autoremat.engines.torch.world.parallel import Parallel, hidden
from autoremat.program import InfeasibleBudget
from autoremat.program.once import Reason

MAX_RETRIES: Final = 3
"""How often a forward that ran out of memory is retried.

Each time it has a tighter plan.
"""


class UnderPlan:
    """Runs the forwards of a callable that have a plan.

    Args:
        fn: the callable, without autoremat.
        planning: makes plans.
        reporter: whom to tell.
        here: what belongs to the thread that calls.
    """

    def __init__(self, fn: Callable[..., Any], planning: Planning, reporter: Reporter, here: Here) -> None:
        self._fn, self._planning, self._reporter, self._here = fn, planning, reporter, here

    def run(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the forward under its plan, tighter where memory runs out."""
        for attempt in range(MAX_RETRIES + 1):
            tape, plan, before = self._tape(kind), kind.plan, RandomStates.now()
            try:
                begin = thread_time()
                with hidden(kind.prepared.parallel), tape.forward():
                    result = self._fn(*args, **kwargs)
                if not torch.cuda.is_initialized():  # there, what takes long goes on beside the forward
                    kind.forward_took(thread_time() - begin)
                self._through(kind, tape)
                self.waits(kind, tape)
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
            del tape  # it and the error's frames held all that the forward made: now there is room to plan
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

    def reports(self, kind: Kind) -> Reports:
        """Say whom the tape of a step of this kind tells what."""
        return Reports(
            lambda reason, growth: self._deviated(kind, reason, growth),
            self._reporter.rerun,
            lambda error: self._planning.ran_out(kind.prepared, error, self._here.living),
        )

    def _tape(self, kind: Kind) -> Tape:
        assert kind.script is not None
        check = None
        if not kind.prepared.checked:
            check = SelfCheck(kind.script.twice, lambda k, why: self.differs(kind, k, why))
        assert kind.plan is not None
        others_bytes = self._here.load.held_bytes
        tape = Tape(
            kind.script, reports=self.reports(kind), check=check, others_bytes=others_bytes, wary=kind.is_wary
        )  # fmt: skip
        tape.ledger.away = away_for(self._planning, kind.script)
        if kind.straying.is_habit:
            tape.note_all(kind.straying.growth)
            self._reporter.counts.deviations += 1
        elif others_bytes and kind.plan.peak_bytes + others_bytes > (kind.script.budget_bytes or math.inf):
            tape.note_all()
        return tape

    def _through(self, kind: Kind, tape: Tape) -> None:
        """Note that a forward has come to its end."""
        kind.step_is_over(tape.way)
        if not tape.policy.is_following and tape.compiled:
            kind.stale = True

    def waits(self, kind: Kind, tape: Tape) -> None:
        """Note that a forward's graph waits for its backward."""
        beside = 0 if kind.script is None else kind.script.waiting_bytes
        held, plain = tape.held_bytes
        self._here.living.add(tape.life(), held + beside, plain + beside, self._here.inputs)

    def differs(self, kind: Kind, k: int, reason: Reason) -> None:
        """Note that a call's rerun turned out to give something else."""
        kind.prepared.differing[k] = reason
        if kind.plan is not None:  # otherwise the user is told once the step has been recorded
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


def _off_the_path(parallel: Parallel) -> str:
    if parallel.units:
        return "and keeps everything, because parameters of fully_shard may be gone when a call is made again"
    return "under the online policy, which lets go of what is cheapest to compute again"


def _outlasting(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield parameters, buffers and gradients.

    If a forward made one of them, running it once more would do so again.
    """
    for _, _, tensor in named_tensors(reachable_modules(fn, args, kwargs)):
        yield tensor
        if is_leaf(tensor) and tensor.grad is not None:
            yield tensor.grad
