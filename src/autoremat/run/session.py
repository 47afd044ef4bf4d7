"""A checkpointed callable over its life: one plan per kind of input, followed call by call."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from autoremat.program import InfeasibleBudget, Plan, Program
from autoremat.record.assemble import OPTIMIZER_STEP
from autoremat.record.casts import mark_casts
from autoremat.record.compiled import eagerly, is_compiled, is_compiling
from autoremat.record.local import Jagged, is_jagged, local_of
from autoremat.record.parallel import Parallel, hidden, parallel_of
from autoremat.record.parallel import signature as parallel_signature
from autoremat.record.record import NothingDifferentiable
from autoremat.record.recorder import Recorder
from autoremat.record.world import named_tensors, reachable_modules
from autoremat.run.instructions import Instructions, instructions_for
from autoremat.run.measure import Measurement, meter_for
from autoremat.run.memory import bytes_at, free_memory, is_out_of_memory, told, without_frames
from autoremat.run.selfcheck import SelfCheck
from autoremat.run.settings import RandomStates
from autoremat.run.stats import Stats
from autoremat.run.tape import Tape

MAX_PLANS: Final = 64
"""Plans of the least recently used kinds of input are forgotten beyond this."""
MAX_DEVIATIONS: Final = 3
"""After so many steps off the recorded path, a kind of input is no longer recorded again."""
MAX_RETRIES: Final = 3
"""How often a forward that ran out of memory is tried again, each time under a tighter plan."""
_SWITCHES: Final = ("gradient_checkpointing", "grad_checkpointing")
"""What the libraries call their own switch: transformers and diffusers; timm."""
TIGHTER: Final = 0.9
"""The next budget, as a share of what the plan has in memory where the device ran out of it."""
MAX_MEASURED: Final = 3
"""How many steps of a plan are tried to measure one."""
TOLERANCE: Final = 0.01
"""How far the measured peak may be above the plan's without a warning."""


class Planner(Protocol):
    """Records steps and plans them; knows the budget."""

    def record(
        self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], *, real: bool, compare: bool,
        later: Callable[[Program], None] | None = None,
    ) -> Program:  # fmt: skip
        """The program of a call; raises ``NotPlannable`` for what can only run without checkpointing.

        ``real``: on real tensors, because the callable takes another path on those than on fake ones. ``compare``: find
        out whether it does. ``later`` is given a second program, if from the second call on it will be another one.
        """

    def solve(self, program: Program, *, at_most_bytes: int | None = None, quick: bool = False) -> Plan:
        """A plan within the budget, and within ``at_most_bytes``; ``quick``: the first that is found."""


class NotPlannable(Exception):
    """The planner cannot deal with this callable; it runs without checkpointing. The message says why."""


@dataclass
class _Entry:
    """What is known for one kind of input.

    Attributes:
        plan: for it; None where it runs without checkpointing.
        instructions: that carry it out; None where nothing runs again.
        stale: it is to be recorded anew.
        quick: the plan is the first that was found, good for a kind of input that never comes back.
        checked: a step with this plan has been through the self-check.
        deviations: steps that left the path.
        parallel: what torch.distributed does around the modules.
        steps: calls under this plan.
        measured_bytes: the measured peak of one of them.
        to_measure: how many more steps may be measured.
    """

    plan: Plan | None = None
    instructions: Instructions | None = None
    stale: bool = False
    quick: bool = False
    checked: bool = False
    deviations: int = 0
    parallel: Parallel = field(default_factory=Parallel)
    steps: int = 0
    later: Program | None = None
    """The program from the second call on, where it is another one."""
    measured_bytes: int | None = None
    to_measure: int = 0
    differing: dict[int, str] = field(default_factory=dict)
    """New reasons why an op must not run again, by its number among the ops of the forward."""

    def follow(self, plan: Plan, *, quick: bool = False) -> None:
        """Take this plan from now on."""
        reruns = len(plan.schedule.order) > len(plan.program.ops)
        may_vary = self.deviations > 0 or plan.program.recorded == "real"
        instructions = instructions_for(plan, may_vary=may_vary) if reruns or may_vary else None
        if instructions is not None and self.parallel.units:  # off the path nobody knows which parameters are there
            instructions = replace(instructions, budget_bytes=None)
        self.plan, self.instructions = plan, instructions
        self.quick, self.checked = quick, False
        self.steps, self.measured_bytes, self.to_measure = 0, None, MAX_MEASURED


@dataclass
class _Counts:
    calls: int = 0
    hits: int = 0
    planned: int = 0
    deviations: int = 0
    unplanned: int = 0
    reruns: int = 0
    rerun_seconds: float = 0.0
    retries: int = 0
    kept: list[str] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)


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
        self._here = threading.local()
        self._last: Plan | None = None
        self._at_most_bytes: int | None = None
        """What the device turned out to have, if it was less than the budget."""
        self._looks_for_fakes = False
        """A recording on fake tensors was not what a step does: new kinds of input are recorded on real ones."""
        self._measurement: Measurement | None = None

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the callable; its results, gradients, buffers and generators are those of a plain run."""
        if torch.compiler.is_compiling():  # first, and without anything that the compiler cannot follow
            self._counts.unplanned += 1
            _tell_compiled()
            return self.fn(*args, **kwargs)
        if getattr(self._here, "inside", False) or _taken_over() or _is_traced():
            return self.fn(*args, **kwargs)
        self._here.inside = True
        try:
            return self._outermost(args, kwargs)
        finally:
            self._here.inside = False

    def _outermost(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._measurement is not None:
            self._end_measurement()
        obstacle = _obstacle() if torch.is_grad_enabled() else ""
        entry = None
        if obstacle:
            self._refuse(obstacle)
        elif torch.is_grad_enabled():
            self._counts.calls += 1
            entry = self._entry(args, kwargs)
            mark_casts()
        with self._turns.call():
            if entry is not None and entry.to_measure and entry.steps > 1:
                return self._measured(entry, args, kwargs)
            return self._run(entry, args, kwargs)

    def _run(self, entry: _Entry | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if entry is None or entry.instructions is None:
            return self._without_tape(entry, args, kwargs)
        return self._with_tape(entry, args, kwargs)

    def _with_tape(self, entry: _Entry, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The forward under the plan, under tighter ones where the device runs out of memory."""
        for attempt in range(MAX_RETRIES + 1):
            tape, plan, before = self._tape(entry), entry.plan, RandomStates.now()
            try:
                with eagerly(), hidden(entry.parallel), tape.forward():
                    result = self.fn(*args, **kwargs)
                self._checked(entry, tape)
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
            reached = tape.n_ops if tape.following else None
            tape.rewind()
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

    def _tape(self, entry: _Entry) -> Tape:
        assert entry.instructions is not None
        return Tape(
            entry.instructions,
            lambda reason: self._deviated(entry, reason),
            self._count_rerun,
            lambda error: self._ran_out(entry, error),
            None if entry.checked else SelfCheck(entry.instructions.twice, lambda k, why: self._differs(entry, k, why)),
        )

    def _checked(self, entry: _Entry, tape: Tape) -> None:
        """From now on the sizes seen are the plan's, and nothing is compared any more."""
        if not entry.checked and tape.following and entry.instructions is not None:
            entry.instructions = replace(entry.instructions, sizes=tape.sizes)
        entry.checked = True

    def _without_tape(self, entry: _Entry | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return self.fn(*args, **kwargs)
        except BaseException as error:
            if entry is not None and entry.plan is not None and is_out_of_memory(error):
                raise self._ran_out(entry, error) from error
            if entry is not None and entry.plan is None:
                entry.stale = True  # this error is why it could not be recorded; the next call may be a good one
            raise

    def prepare(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Plan for a call without running it."""
        if not _obstacle():
            self._entry(args, kwargs)

    def kept(self) -> tuple[str, ...]:
        """The operators that turned out to give something else when they run again: where, and why."""
        return tuple(self._counts.kept)

    def stats(self) -> Stats:
        """What has happened so far."""
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
                entry = self._plan(args, kwargs, entry)
                self._entries[key] = entry
                while len(self._entries) > MAX_PLANS:
                    self._entries.popitem(last=False)
            elif entry.plan is not None and entry.later is not None:
                later, entry.later = entry.later, None
                with contextlib.suppress(InfeasibleBudget):  # then it leaves the path of the first call
                    self._solve(entry, later)
            elif entry.plan is not None and (entry.quick or entry.differing):
                self._solve(entry, entry.plan.program)
            elif entry.plan is not None:
                self._counts.hits += 1
            entry.steps += 1
            self._entries.move_to_end(key)
            self._last = entry.plan or self._last
            return entry

    def _plan(self, args: Sequence[Any], kwargs: dict[str, Any], before: _Entry | None) -> _Entry:
        """Record and plan. A kind of input that was never met before gets a quick plan, unless it is the first one."""
        entry = _Entry(
            deviations=before.deviations if before is not None else 0,
            parallel=parallel_of(reachable_modules(self.fn, args, kwargs)),
        )
        if switched_on := _own_checkpointing(self.fn, args, kwargs):
            self._warn(
                f"the model's own checkpointing is switched on (in {switched_on}): what it wraps is computed again as "
                "a whole, whatever the budget, and only the rest is planned. Switch it off to let the budget decide: "
                "activation_checkpointing_disable() or gradient_checkpointing_disable() in transformers, "
                "disable_gradient_checkpointing() in diffusers, set_grad_checkpointing(False) in timm"
            )
        try:
            with self._turns.recording():
                first = self._last is None
                real = entry.deviations > 0 or self._looks_for_fakes
                program = self.planner.record(
                    self.fn, args, kwargs, real=real, compare=first, later=functools.partial(setattr, entry, "later")
                )
                self._looks_for_fakes = self._looks_for_fakes or (first and program.recorded == "real")
                self._solve(entry, program, quick=before is None and self._last is not None)
        except NothingDifferentiable:
            if self._last is None:
                raise
            return entry  # it has been trained before; this call, an evaluation say, needs no plan
        except NotPlannable as obstacle:
            self._warn(f"{obstacle}; it runs without checkpointing")
            self._counts.unplanned += 1
        return entry

    def _solve(self, entry: _Entry, program: Program, *, quick: bool = False) -> None:
        """Plan a program, less what has turned out not to be repeatable."""
        if entry.differing:
            ops = list(program.ops)
            for k, reason in entry.differing.items():
                i = program.forward[k]
                ops[i] = replace(ops[i], repeatable=reason)
            program, entry.differing = replace(program, ops=tuple(ops)), {}
        entry.follow(self.planner.solve(program, at_most_bytes=self._at_most_bytes, quick=quick), quick=quick)
        self._counts.planned += 1

    def _differs(self, entry: _Entry, k: int, reason: str) -> None:
        assert entry.plan is not None
        entry.differing[k] = reason
        program = entry.plan.program
        op = program.ops[program.forward[k]]
        what = f"{op.name} in {op.module or 'the step'} ({op.source or 'unknown line'}) must not run again: {reason}"
        self._counts.kept.append(what)
        self._warn(f"{what}. What it makes is kept from now on")

    def _deviated(self, entry: _Entry, reason: str) -> None:
        entry.deviations += 1
        self._looks_for_fakes |= entry.plan is not None and entry.plan.program.recorded == "fake"
        self._counts.deviations += 1
        entry.stale = entry.deviations <= MAX_DEVIATIONS
        self._warn(
            f"a step left the path that was recorded ({reason}); it goes on {_off_the_path(entry.parallel)}; its "
            "gradients are exact. The next step of this kind is recorded anew"
        )
        if not entry.stale:
            self._warn(
                f"the forward has left its recorded path {entry.deviations} times for the same kind of input (it "
                "depends on the data or on state outside); it is not recorded again: steps that leave the path of the "
                "last recording go on under the online policy"
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
        had = plan.peak_bytes if reached is None else bytes_at(plan, reached)
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


class _Turns:
    """Calls of several threads run side by side; a recording, which puts fake tensors into the modules, runs alone."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._calls, self._recording = 0, False

    @contextmanager
    def call(self) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._recording)
            self._calls += 1
        try:
            yield
        finally:
            with self._change:
                self._calls -= 1
                self._change.notify_all()

    @contextmanager
    def recording(self) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: not self._calls and not self._recording)
            self._recording = True
        try:
            yield
        finally:
            with self._change:
                self._recording = False
                self._change.notify_all()


def _off_the_path(parallel: Parallel) -> str:
    if parallel.units:
        return "and keeps everything, because parameters of fully_shard may be gone when an operator runs again"
    return "under the online policy, which lets go of what is cheapest to compute again"


def _taken_over() -> bool:
    """Whether an outer recording or tape sees every operator already."""
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(isinstance(mode, (Tape, Recorder)) for mode in stack)


def _is_traced() -> bool:
    """Whether ``torch.jit.trace`` or an ONNX export looks on, which want the plain callable's graph."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def _own_checkpointing(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The first module in training whose library's switch for ``torch.utils.checkpoint`` is on; "" if none is."""
    for root in reachable_modules(fn, args, kwargs):
        for name, module in root.named_modules():
            if module.training and any(getattr(module, switch, None) is True for switch in _SWITCHES):
                return name or type(module).__name__
    return ""


def _outlasting(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Parameters, buffers and gradients: if a forward made one of them, running it once more would do so again."""
    for _, _, tensor in named_tensors(reachable_modules(fn, args, kwargs)):
        yield tensor
        if tensor.is_leaf and tensor.grad is not None:
            yield tensor.grad


_INSIDE_COMPILE: Final = "called inside torch.compile"


def _tell_compiled() -> None:
    """Warn, once for every compilation: the compiler calls this itself and puts nothing of it into its graph."""
    warnings.warn(
        f"autoremat: {_INSIDE_COMPILE}: running without checkpointing; to have the step planned, call the checkpointed "
        "module from code that is not compiled",
        RuntimeWarning,
        stacklevel=2,
    )


_tell_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports the compiler


def _obstacle() -> str:
    """Why a tape cannot run here; "" if it can."""
    if is_compiling():
        return _INSIDE_COMPILE
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "called inside a torch.func transform (grad, vmap, ...)"
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message():
        return "saved-tensor hooks are disabled here"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved-tensor hooks are active around the call, and they would not see what autoremat keeps"
    if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        return "another TorchDispatchMode is active"
    return ""


def input_signature(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What makes two calls the same kind: everything that usually decides which operators run.

    Shapes, strides, dtypes, devices and ``requires_grad`` of tensor arguments; other arguments by value where they
    are numbers, strings or flags; of every module that the callable can reach, ``training``, and which parameters
    require and have gradients; autocast.
    """
    leaves, structure = torch.utils._pytree.tree_flatten((tuple(args), kwargs))
    roots = reachable_modules(fn, args, kwargs)
    modules = _all_modules(roots)
    flags = tuple([(m.training, is_compiled(m)) for m in modules])
    tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
    tensors = tuple([_tensor_signature(t) for table in tables for t in table.values() if t is not None])
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    around = parallel_signature(parallel_of(roots))
    return structure, tuple(_leaf_signature(x) for x in leaves), flags, tensors, autocast, around


def _all_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """These modules and all inside them, each once; ``nn.Module.modules`` takes several times as long."""
    found: dict[int, nn.Module] = {}
    pending = list(roots)
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            pending += [m for m in module._modules.values() if m is not None]
    return list(found.values())


def _tensor_signature(tensor: Tensor) -> tuple[Any, ...]:
    shape = None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return tensor.requires_grad, tensor.is_leaf and tensor.grad is not None, tensor.dtype, shape


def _leaf_signature(x: Any) -> Any:
    if is_jagged(x):  # every one has a size of its own, told by its offsets
        inside = Jagged.of(x)
        return "jagged", _leaf_signature(local_of(x)), tuple(inside.offsets.shape), x.requires_grad
    if isinstance(x, Tensor):
        stride = tuple(x.stride()) if x.layout is torch.strided else None
        grad = x.is_leaf and x.grad is not None
        return x.dtype, tuple(x.shape), stride, x.device, x.requires_grad, grad, getattr(x, "placements", None)
    if isinstance(x, (int, float, str, bool, type(None), complex, bytes)):
        return type(x), x
    return id(x) if isinstance(x, nn.Module) else type(x)
