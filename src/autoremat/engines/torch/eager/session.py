"""A checkpointed callable over its life: one plan per kind of input, followed call by call."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from autoremat.engines.torch.eager.check import SelfCheck
from autoremat.engines.torch.eager.first import Cached, FirstStep, NotRecorded
from autoremat.engines.torch.eager.listener import is_listening
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.script import Script, script_of
from autoremat.engines.torch.eager.sections import Sections, Taken, with_taken
from autoremat.engines.torch.eager.several import Calls, Living, Load, plan_for
from autoremat.engines.torch.eager.tape import Reports, Tape
from autoremat.program import InfeasibleBudget, Plan, Program, simulate
from autoremat.record.assemble import OPTIMIZER_STEP
from autoremat.record.local import local_of
from autoremat.record.parallel import Parallel, check_supported, hidden, parallel_of
from autoremat.record.record import NothingDifferentiable, check_devices
from autoremat.record.values import storage_of
from autoremat.record.world import named_tensors, reachable_modules
from autoremat.run.measure import Measurement, meter_for
from autoremat.run.memory import free_memory, is_out_of_memory, told, without_frames
from autoremat.run.session import (
    MAX_DEVIATIONS,
    MAX_MEASURED,
    MAX_PLANS,
    MAX_RETRIES,
    TIGHTER,
    TOLERANCE,
    _Counts,
    _is_traced,
    _obstacle,
    _off_the_path,
    _outlasting,
    _own_checkpointing,
    _taken_over,
    _tell_compiled,
    _Turns,
    input_signature,
)
from autoremat.run.session import Session as SessionOfOperators
from autoremat.run.settings import RandomStates
from autoremat.run.stats import Stats

_FORGIVEN: Final = 0.1
"""So much less a kind of input strays with every step that stays on its path."""
_PATIENCE: Final = 3
"""A quick plan serves for so many times as long as a better one takes to be found."""
_NO_HOOKS: Final = "don't yet support saved tensor hooks"
"""What torch.func says where hooks are active."""


class Planner(Protocol):
    """Plans steps; knows the budget."""

    def record(
        self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, real: bool, compare: bool,
        later: Callable[[Program], None] | None = None,
    ) -> Program:  # fmt: skip
        """The program of a call that is not made, by its operators."""

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


@dataclass
class _Entry:
    """What is known for one kind of input.

    Attributes:
        plan: for it; None where it runs without checkpointing.
        script: that carries it out; None where there is no plan.
        stale: it is to be recorded anew.
        quick: the plan is the first that was found, good for a kind of input that never comes back.
        since_seconds: when it was made.
        checked: a step with this plan has been through the self-check.
        deviations: steps that left the path.
        straying: how much of late: one for each, a tenth less for every step that makes the calls of the path.
        way: where the last step left the path, and how many calls it made; None if it did not.
        records: how often it has been recorded.
        together: calls before one backward that the plan is for.
        growth: by so much what steps made was larger than recorded, at most.
        parallel: what torch.distributed does around the modules.
        steps: calls under this plan.
        measured_bytes: the measured peak of one of them.
        to_measure: how many more steps may be measured.
    """

    plan: Plan | None = None
    script: Script | None = None
    stale: bool = False
    is_new: bool = False
    quick: bool = False
    since_seconds: float = 0.0
    checked: bool = False
    deviations: int = 0
    straying: float = 0.0
    way: tuple[int, int] | None = None
    records: int = 0
    together: int = 1
    growth: float = 1.0
    parallel: Parallel = field(default_factory=Parallel)
    steps: int = 0
    measured_bytes: int | None = None
    to_measure: int = 0
    differing: dict[int, str] = field(default_factory=dict)
    """New reasons why an op must not run again, by its number among the ops of the forward."""

    path: Path | None = None
    cached: Cached | None = None
    """What the first step may have left for the second one to find."""
    sections: Sections | None = None
    """What listens to code of the user's in the backward of the first step."""
    taken: tuple[Taken, ...] = ()
    """What such code takes, if that is not in the plan yet."""

    def follow(self, plan: Plan, budget_bytes: int, *, quick: bool = False) -> None:
        """Take this plan from now on; all calls before one backward have so many bytes."""
        assert self.path is not None
        script = replace(script_of(plan, self.path), budget_bytes=budget_bytes)
        if self.parallel.units:  # off the path nobody knows which parameters are there
            script = replace(script, budget_bytes=None)
        self.plan, self.script = plan, script
        self.quick, self.since_seconds, self.checked = quick, perf_counter(), False
        self.steps, self.measured_bytes, self.to_measure = 0, None, MAX_MEASURED


class _Here(threading.local):
    """What belongs to one thread: whether it is in a call, and which graphs wait for their backward."""

    def __init__(self) -> None:
        self.inside = False
        self.living, self.load = Living(), Load()
        self.inputs: dict[int, int] = {}

    def next_call(self, inputs: dict[int, int]) -> None:
        """A call comes, with this input."""
        self.inputs, self.load = inputs, self.living.next_call(inputs)


class Session:
    """Calls ``fn`` under the plan for its input; makes the plan at the first call of a kind.

    Args:
        fn: the callable, without autoremat.
        planner: makes a plan for a call; raises ``NotPlannable`` for what can only run without checkpointing.
        measure: measure the peak of one step of every plan, whatever that takes.
    """

    def __init__(self, fn: Callable[..., Any], planner: Planner, *, measure: bool = False) -> None:
        self.fn, self.planner, self.measure = fn, planner, measure
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._counts = _Counts()
        self._lock = threading.RLock()
        self._turns = _Turns()
        self._here = _Here()
        self._last: Plan | None = None
        self._at_most_bytes: int | None = None
        """What the device turned out to have, if it was less than the budget."""
        self._told: set[tuple[int, str]] = set()
        """What is known to be kept: the call, and the words for it."""
        self._planning_seconds = 0.0
        """What the last plan took that was not quick."""
        self._measurement: Measurement | None = None
        self._by_operators: SessionOfOperators | None = None
        """What runs the callable where parameters come and go (fully_shard): the engine that watches operators."""

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the callable; its results, gradients, buffers and generators are those of a plain run."""
        if torch.compiler.is_compiling():  # first, and without anything that the compiler cannot follow
            self._counts.unplanned += 1
            _tell_compiled()
            return self.fn(*args, **kwargs)
        if self._here.inside or _is_heard() or _is_traced():
            return self.fn(*args, **kwargs)
        self._here.inside = True
        try:
            return self._outermost(args, kwargs)
        finally:
            self._here.inside = False

    def _outermost(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._measurement is not None:
            self._end_measurement()
        obstacle = (_obstacle() or _forward_mode()) if torch.is_grad_enabled() else ""
        entry = None
        if obstacle:
            self._refuse(obstacle)
        elif torch.is_grad_enabled():
            self._counts.calls += 1
            self._here.next_call(_bytes_by_address(args, kwargs))
            entry = self._entry(args, kwargs)
        with self._turns.call():
            if entry is not None and entry.to_measure and entry.steps > 1:
                return self._measured(entry, args, kwargs)
            return self._run(entry, args, kwargs)

    def _run(self, entry: _Entry | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._by_operators is not None:
            return self._by_operators.call(args, kwargs)
        if entry is not None and entry.is_new:
            return self._first(entry, args, kwargs)
        if entry is None or entry.script is None:
            return self._without_tape(entry, args, kwargs)
        return self._with_tape(entry, args, kwargs)

    def _first(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The first step of a kind: noted, within the budget; planned at the end of its forward."""
        entry.is_new = entry.stale = False
        is_first, known = self._last is None, entry.path
        check = SelfCheck(None, lambda k, why: self._differs(entry, k, why))
        step = FirstStep(
            self.fn, args, kwargs, entry.parallel, self._room, self.planner.is_kept, self._reports(entry), check
        )  # fmt: skip
        before = RandomStates.now()
        try:
            with hidden(entry.parallel):
                result = step.forward()
        except BaseException as error:
            if isinstance(error, RuntimeError) and _NO_HOOKS in str(error):
                before.restore()
                self._refuse(
                    "the forward differentiates with torch.func, which refuses the saved-tensor hooks of autoremat "
                    "(what it had done up to there has been done twice)"
                )
                return self.fn(*args, **kwargs)
            entry.is_new = True  # this error is why it could not be recorded; the next call may be a good one
            raise
        if step.compiled:
            self._refuse(
                f"{step.compiled} is compiled by torch.compile, and autoremat cannot see into compiled code; "
                "leave torch.compile out there, or checkpoint only what is not compiled"
            )
            return result
        try:
            step.backward(result)
            program = self.planner.assembled(step)
            entry.path = step.path()
            if entry.script is not None and entry.path == known:
                step.tape.take_plan(entry.script)
                return result
            for k, reason in entry.differing.items():
                self._tell_kept(program, k, reason)
            self._solve(entry, program, quick=not is_first and known is None)
            entry.steps, entry.cached = 1, step.cached(result) if known is None else None
            if entry.script is not None:
                step.tape.take_plan(entry.script)
                entry.sections = step.tape.sections
        except NothingDifferentiable:
            entry.is_new = True
            if is_first:
                raise
        except NotRecorded as obstacle:
            self._warn(f"the step could not be recorded ({obstacle}); it runs without checkpointing")
            self._counts.unplanned += 1
        self._last = entry.plan or self._last
        self._waits(entry, step.tape)
        return result

    def _waits(self, entry: _Entry, tape: Tape) -> None:
        """A forward is over, and its graph waits for its backward."""
        beside = 0 if entry.script is None else entry.script.waiting_bytes
        held, plain = tape.held_bytes
        self._here.living.add(tape.life(), held + beside, plain + beside, self._here.inputs)

    def _room(self, fixed_bytes: int) -> Callable[[int], float]:
        """What a first step may take beside what is there for good, and beside the graphs of earlier calls."""
        share, load = self.planner.first(fixed_bytes), self._here.load
        return lambda plain_bytes: share(plain_bytes + load.plain_bytes) - load.held_bytes

    def _with_tape(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The forward under the plan, under tighter ones where the device runs out of memory."""
        for attempt in range(MAX_RETRIES + 1):
            tape, plan, before = self._tape(entry), entry.plan, RandomStates.now()
            try:
                with hidden(entry.parallel), tape.forward():
                    result = self.fn(*args, **kwargs)
                self._through(entry, tape)
                self._waits(entry, tape)
                return result
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                refusal = without_frames(error)
            is_safe = (
                not entry.parallel
                and not tape.has_effects
                and not any(map(tape.has_made, _outlasting(self.fn, args, kwargs)))
            )
            reached = tape.n_calls - 1 if tape.policy.is_following else None
            del tape  # with the error's frames, all that the forward has made: now there is room to plan
            free_memory()
            try:
                self._tighten(entry, reached)
            except InfeasibleBudget as infeasible:
                raise told(refusal, plan) from infeasible
            if not is_safe or attempt == MAX_RETRIES:
                raise told(refusal, plan) from refusal
            before.restore()
            self._counts.retries += 1
        raise AssertionError("unreachable")

    def _reports(self, entry: _Entry) -> Reports:
        return Reports(
            lambda reason, growth: self._deviated(entry, reason, growth),
            self._count_rerun,
            lambda error: self._ran_out(entry, error),
        )

    def _tape(self, entry: _Entry) -> Tape:
        assert entry.script is not None
        check = None
        if not entry.checked:
            check = SelfCheck(entry.script.twice, lambda k, why: self._differs(entry, k, why))
        assert entry.plan is not None
        others_bytes = self._here.load.held_bytes
        tape = Tape(entry.script, reports=self._reports(entry), check=check, others_bytes=others_bytes)
        if entry.straying > MAX_DEVIATIONS:
            tape.note_all(entry.growth)
            self._counts.deviations += 1
        elif others_bytes and entry.plan.peak_bytes + others_bytes > (entry.script.budget_bytes or math.inf):
            tape.note_all()
        return tape

    def _through(self, entry: _Entry, tape: Tape) -> None:
        """A forward has come to its end."""
        entry.checked = True
        way, before, entry.way = tape.way, entry.way, tape.way
        if way is None:
            entry.straying = max(0.0, entry.straying - _FORGIVEN)
        elif way == before and entry.records <= MAX_DEVIATIONS:  # for good, it seems: the last step did the same
            entry.stale = True
        if tape.compiled and not tape.policy.is_following:
            entry.stale = True

    def _without_tape(self, entry: _Entry | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return self.fn(*args, **kwargs)
        except BaseException as error:
            if entry is not None and entry.plan is not None and is_out_of_memory(error):
                raise self._ran_out(entry, error) from error
            if entry is not None and entry.plan is None:
                entry.is_new = True  # this error is why it could not be recorded; the next call may be a good one
            raise

    def kept(self) -> tuple[str, ...]:
        """The operators that turned out to give something else when they run again: where, and why."""
        return tuple(self._counts.kept)

    def stats(self) -> Stats:
        """What has happened so far."""
        if self._by_operators is not None:
            return self._by_operators.stats()
        if self._measurement is not None:
            self._end_measurement()
        c = self._counts
        return Stats(
            plan=self._last,
            measured_peak_bytes=next((e.measured_bytes for e in self._entries.values() if e.plan is self._last), None),
            plans=len(self._entries),
            calls=c.calls,
            hits=c.hits,
            planned=c.planned,
            deviations=c.deviations,
            unplanned=c.unplanned,
            reruns=c.reruns,
            rerun_seconds=c.rerun_seconds,
            retries=c.retries,
            differing=len(c.kept),
        )

    # ---- the measured peak ---------------------------------------------------------------------------------------

    def _measured(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call with an account of the memory of its step, where one can be had."""
        entry.to_measure -= 1
        measurement = self._measurement_of(entry, args, kwargs) if self._measurement is None else None
        if measurement is None:
            return self._run(entry, args, kwargs)
        self._measurement = measurement
        result = self._run(entry, args, kwargs)
        measurement.watch(result)
        return result

    def _measurement_of(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> Measurement | None:
        plan, deviations = entry.plan, entry.deviations
        assert plan is not None
        given = (x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        own = (t for _, _, t in named_tensors(reachable_modules(self.fn, args, kwargs)))
        meter = meter_for(itertools.chain(given, own), asked=self.measure)
        if meter is None:
            return None

        def on_end(above_bytes: int) -> None:
            if entry.plan is plan and entry.deviations == deviations:
                entry.measured_bytes, entry.to_measure = plan.program.fixed_bytes + above_bytes, 0
                self._compare(plan, entry.measured_bytes)

        with_optimizer = any(op.name == OPTIMIZER_STEP for op in plan.program.ops[-1:])
        return Measurement(meter, with_optimizer, on_end)

    def _end_measurement(self) -> None:
        if self._measurement is not None and self._measurement.close():
            self._measurement = None

    def _compare(self, plan: Plan, measured_bytes: int) -> None:
        if measured_bytes > (1 + TOLERANCE) * plan.peak_bytes:
            self._warn(
                f"the measured peak of a step is above the plan's ({measured_bytes:,} bytes, predicted were "
                f"{plan.peak_bytes:,}; the budget is {plan.budget_bytes:,}). What runs outside the callable is not in "
                "a plan: wrap a function that returns the loss, and name the optimizer with optimizer=. What cannot be "
                "inside needs a budget that leaves room for it"
            )

    def _entry(self, args: Sequence[Any], kwargs: dict[str, Any]) -> _Entry:
        with self._lock:
            key = input_signature(self.fn, args, kwargs)
            entry = self._entries.get(key)
            if entry is None or entry.stale:
                entry = self._entries[key] = self._new(args, kwargs, entry)
                while len(self._entries) > MAX_PLANS:
                    self._entries.popitem(last=False)
            elif entry.cached is not None and not entry.differing and entry.cached.outlive():
                entry.is_new = True  # the second step will make other calls than the first one
            elif entry.plan is not None and self._has_to_plan(entry):
                quick = bool(entry.taken) or entry.together < self._here.living.usual
                self._solve(entry, entry.plan.program, quick=quick)
            elif entry.plan is not None:
                self._counts.hits += 1
            entry.steps, entry.cached = entry.steps + 1, None
            self._entries.move_to_end(key)
            self._last = entry.plan or self._last
            return entry

    def _new(self, args: Sequence[Any], kwargs: dict[str, Any], before: _Entry | None) -> _Entry:
        """A kind of input that has never been met, or is to be recorded anew."""
        modules = reachable_modules(self.fn, args, kwargs)
        check_devices(modules, args, kwargs)
        entry = _Entry(parallel=parallel_of(modules))
        if before is not None:
            entry.deviations, entry.straying, entry.records = before.deviations, before.straying, before.records
        entry.records += 1
        if switched_on := _own_checkpointing(self.fn, args, kwargs):
            self._warn(
                f"the model's own checkpointing is switched on (in {switched_on}): what it wraps is computed again as "
                "a whole, whatever the budget, and only the rest is planned. Switch it off to let the budget decide: "
                "activation_checkpointing_disable() or gradient_checkpointing_disable() in transformers, "
                "disable_gradient_checkpointing() in diffusers, set_grad_checkpointing(False) in timm"
            )
        try:
            check_supported(entry.parallel, modules)
            entry.is_new = True
            if entry.parallel.units and self._by_operators is None:
                self._by_operators = SessionOfOperators(self.fn, self.planner, measure=self.measure)
        except Exception as obstacle:  # noqa: BLE001 - it says in words what it cannot deal with
            self._warn(
                f"the step could not be recorded ({type(obstacle).__name__}: {obstacle}); it runs without checkpointing"
            )
            self._counts.unplanned += 1
        return entry

    def _solve(self, entry: _Entry, program: Program, *, quick: bool = False) -> None:
        """Plan a program, less what has turned out not to be repeatable."""
        if entry.differing:
            ops = list(program.ops)
            for i, op in enumerate(ops):
                if op.call in entry.differing and not op.repeatable:
                    ops[i] = replace(op, repeatable=entry.differing[op.call])
            program, entry.differing = replace(program, ops=tuple(ops)), {}
        program = with_taken(program, entry.taken)
        begin = perf_counter()
        n = entry.together = max(entry.together, self._here.living.usual)
        if n > 1:
            calls = Calls(n, self._here.living.input_bytes)
            budget_bytes = self.planner.budget_bytes(program, calls.plain_peak_bytes(program))
            plan = self._plan_for_several(program, calls, budget_bytes, quick)
        else:
            plan = self._plan_for_one(program, quick, goes_on=bool(entry.taken))
            budget_bytes = plan.budget_bytes
        entry.taken = ()
        entry.follow(plan, budget_bytes, quick=quick and n == 1)
        self._counts.planned += 1
        if not quick:
            self._planning_seconds = perf_counter() - begin

    def _plan_for_one(self, program: Program, quick: bool, *, goes_on: bool) -> Plan:
        """The plan for a call that has its backward next; ``goes_on``: the smallest, where none is small enough."""
        try:
            return self.planner.solve(program, at_most_bytes=self._at_most_bytes, quick=quick)
        except InfeasibleBudget as error:
            if not goes_on:
                raise
            self._warn(
                "the first backward has shown what custom Functions and hooks take in it, and no plan keeps the step "
                f"within the budget with that (the smallest that was found takes {error.floor_bytes:,} bytes, the "
                f"budget is {error.budget_bytes:,}): it goes on under the smallest; give it more"
            )
            return self.planner.solve(program, within_bytes=error.floor_bytes, quick=quick)

    def _plan_for_several(self, program: Program, calls: Calls, most: int, quick: bool) -> Plan:
        """The plan for one of several calls before one backward."""
        most = most if self._at_most_bytes is None else min(most, self._at_most_bytes)
        plan = plan_for(
            calls, most, lambda b, first: self.planner.solve(program, within_bytes=b, quick=first), quick=quick
        )  # fmt: skip
        if (needed := calls.needed_bytes(plan)) > most:
            self._warn(
                f"{calls.n} calls wait for one backward, and no plan keeps all of them within the budget (the smallest "
                f"that was found takes {needed:,} bytes, the budget is {most:,}): go backward after fewer calls, or "
                "give them more"
            )
        return plan

    def _has_to_plan(self, entry: _Entry) -> bool:
        """Whether the plan is to be made anew of what is recorded.

        A quick plan is, once the training has gone on with it for so long that a better one costs little beside.
        """
        if entry.sections is not None:
            entry.taken, entry.sections = entry.sections.close(), None
        is_worth = perf_counter() - entry.since_seconds > _PATIENCE * self._planning_seconds
        return (
            bool(entry.differing or entry.taken)
            or entry.together < self._here.living.usual
            or (entry.quick and is_worth)
        )

    def _differs(self, entry: _Entry, k: int, reason: str) -> None:
        entry.differing[k] = reason
        if entry.plan is not None:  # else it is told once the step has been recorded
            self._tell_kept(entry.plan.program, k, reason)

    def _tell_kept(self, program: Program, k: int, reason: str) -> None:
        op = [op for op in program.ops if op.call == k][-1]
        what = f"{op.name} in {op.module or 'the step'} ({op.source or 'unknown line'}) must not run again: {reason}"
        if (k, what) not in self._told:  # recorded twice, it is found twice
            self._told.add((k, what))
            self._counts.kept.append(what)
        self._warn(f"{what}. What it makes is kept from now on")

    def _deviated(self, entry: _Entry, reason: str, growth: float) -> None:
        entry.deviations += 1
        entry.straying += 1
        entry.growth = max(entry.growth, growth)
        self._counts.deviations += 1
        has_grown = growth > 1
        entry.stale = has_grown and entry.records <= MAX_DEVIATIONS
        self._warn(
            f"a step left the path that was recorded ({reason}); it goes on {_off_the_path(entry.parallel)}; its "
            "gradients are exact. When steps leave it for good, the next one is recorded anew"
        )
        if entry.straying > MAX_DEVIATIONS or (has_grown and not entry.stale):
            self._warn(
                f"the forward leaves its recorded path again and again for the same kind of input ({entry.deviations} "
                "times so far: it depends on the data or on state outside); such steps run under the online policy"
            )

    def _ran_out(self, entry: _Entry, error: BaseException) -> BaseException:
        """The device has less than the plan takes: say what the plan accounts for, and plan tighter next time."""
        plan = entry.plan
        with contextlib.suppress(InfeasibleBudget):
            self._tighten(entry)
        return told(error, plan)

    def _tighten(self, entry: _Entry, reached: int | None = None) -> None:
        """Plan for what the device turned out to have: less than what the op needs that the forward has reached.

        Raises:
            InfeasibleBudget: no plan is that small; the old one stays.
        """
        plan = entry.plan
        assert plan is not None
        had = plan.peak_bytes if reached is None else _bytes_at(plan, reached)
        before, self._at_most_bytes = self._at_most_bytes, int(TIGHTER * had)
        try:
            self._solve(entry, plan.program)
        except InfeasibleBudget:
            self._at_most_bytes = before
            raise

    def _count_rerun(self, seconds: float) -> None:
        self._counts.reruns += 1
        self._counts.rerun_seconds += seconds

    def _refuse(self, obstacle: str) -> None:
        self._counts.unplanned += 1
        self._warn(f"{obstacle}: running without checkpointing")

    def _warn(self, message: str) -> None:
        """Say each thing once."""
        kind = message.split("(")[0]
        if kind not in self._counts.warned:
            self._counts.warned.add(kind)
            warnings.warn(f"autoremat: {message}", RuntimeWarning, stacklevel=2)


def _forward_mode() -> str:
    """Words for a call within forward-mode differentiation, where every call has to be kept; "" elsewhere."""
    is_on = forward_ad._current_level >= 0
    return "called inside forward-mode differentiation (a dual level), where nothing may run again" if is_on else ""


def _bytes_by_address(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int, int]:
    """The memory of the tensors among the arguments."""
    given = (t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    return {s._cdata: s.nbytes() for t in given if (s := storage_of(local_of(t))) is not None}


def _bytes_at(plan: Plan, call: int) -> int:
    """The most that the plan has in memory while this call is first made; its peak if there is no such call."""
    ops = [i for i in plan.program.forward if plan.program.ops[i].call == call]
    resident = simulate(plan.program, plan.schedule).resident_bytes
    return max((resident[plan.schedule.order.index(i)] for i in ops), default=plan.peak_bytes)


def _is_heard() -> bool:
    """Whether an outer recording or tape sees every call already."""
    return is_listening() or _taken_over()
