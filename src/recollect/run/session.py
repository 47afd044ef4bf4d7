"""A checkpointed callable over its life: one plan per kind of input, followed call by call."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from recollect.program import Plan
from recollect.record.record import NothingDifferentiable
from recollect.record.recorder import Recorder
from recollect.record.world import named_tensors, reachable_modules
from recollect.run.instructions import Instructions, instructions_for
from recollect.run.tape import Tape

Planner = Callable[[Callable[..., Any], Sequence[Any], dict[str, Any]], Plan]

MAX_PLANS: Final = 32
"""Plans of the least recently used kinds of input are forgotten beyond this."""
MAX_DEVIATIONS: Final = 3
"""After so many steps off the recorded path, a kind of input is no longer planned again."""


class NotPlannable(Exception):
    """The planner cannot deal with this callable; it runs without checkpointing. The message says why."""


@dataclass(frozen=True)
class Stats:
    """What a checkpointed callable has done so far.

    Attributes:
        plan: the plan used last; None before the first call.
        plans: number of plans in the cache.
        calls: calls with gradients.
        planned: calls for which a new plan was made.
        deviations: calls that left the recorded path and kept everything from there on.
        unplanned: calls that ran without checkpointing.
        reruns: operators run again in all backward passes so far.
    """

    plan: Plan | None
    plans: int
    calls: int
    planned: int
    deviations: int
    unplanned: int
    reruns: int


@dataclass
class _Entry:
    """What is known for one kind of input."""

    plan: Plan | None
    instructions: Instructions | None
    stale: bool = False
    deviations: int = 0


@dataclass
class _Counts:
    calls: int = 0
    planned: int = 0
    deviations: int = 0
    unplanned: int = 0
    reruns: int = 0
    warned: set[str] = field(default_factory=set)


class Session:
    """Calls ``fn`` under the plan for its input; makes the plan at the first call of a kind.

    Args:
        fn: the callable, without recollect.
        planner: makes a plan for a call; raises ``NotPlannable`` for what can only run without checkpointing.
    """

    def __init__(self, fn: Callable[..., Any], planner: Planner) -> None:
        self.fn, self._planner = fn, planner
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._counts = _Counts()
        self._lock = threading.RLock()
        self._turns = _Turns()
        self._here = threading.local()
        self._last: Plan | None = None

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the callable; its results, gradients, buffers and generators are those of a plain run."""
        if getattr(self._here, "inside", False) or _taken_over():
            return self.fn(*args, **kwargs)
        self._here.inside = True
        try:
            return self._outermost(args, kwargs)
        finally:
            self._here.inside = False

    def _outermost(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        obstacle = _obstacle() if torch.is_grad_enabled() else ""
        entry = None
        if obstacle:
            self._refuse(obstacle)
        elif torch.is_grad_enabled():
            self._counts.calls += 1
            entry = self._entry(args, kwargs)
        with self._turns.call():
            if entry is None or entry.instructions is None:
                return self._without_tape(entry, args, kwargs)
            tape = Tape(entry.instructions, lambda reason: self._deviated(entry, reason), self._count_rerun)
            with tape.forward():
                return self.fn(*args, **kwargs)

    def _without_tape(self, entry: _Entry | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return self.fn(*args, **kwargs)
        except BaseException:
            if entry is not None and entry.plan is None:
                entry.stale = True  # this error is why it could not be recorded; the next call may be a good one
            raise

    def stats(self) -> Stats:
        """What has happened so far."""
        c = self._counts
        return Stats(self._last, len(self._entries), c.calls, c.planned, c.deviations, c.unplanned, c.reruns)

    def _entry(self, args: Sequence[Any], kwargs: dict[str, Any]) -> _Entry:
        with self._lock:
            key = input_signature(self.fn, args, kwargs)
            entry = self._entries.get(key)
            if entry is None or entry.stale:
                entry = self._plan(args, kwargs, entry)
                self._entries[key] = entry
                while len(self._entries) > MAX_PLANS:
                    self._entries.popitem(last=False)
            self._entries.move_to_end(key)
            self._last = entry.plan or self._last
            return entry

    def _plan(self, args: Sequence[Any], kwargs: dict[str, Any], before: _Entry | None) -> _Entry:
        deviations = before.deviations if before is not None else 0
        if deviations > MAX_DEVIATIONS:
            self._warn(
                f"the forward has left its recorded path {deviations} times for the same kind of input (it depends on "
                "the data or on state outside); such calls keep everything from now on and may exceed the budget"
            )
            return _Entry(None, None, deviations=deviations)
        try:
            with self._turns.recording():
                plan = self._planner(self.fn, args, kwargs)
        except NothingDifferentiable:
            if self._last is None:
                raise
            return _Entry(None, None)  # it has been trained before; this call, an evaluation say, needs no plan
        except NotPlannable as obstacle:
            self._warn(f"{obstacle}; it runs without checkpointing")
            self._counts.unplanned += 1
            return _Entry(None, None)
        self._counts.planned += 1
        reruns = len(plan.schedule.order) > len(plan.program.ops)
        return _Entry(plan, instructions_for(plan) if reruns else None, deviations=deviations)

    def _deviated(self, entry: _Entry, reason: str) -> None:
        entry.stale = True
        entry.deviations += 1
        self._counts.deviations += 1
        self._warn(
            f"a step left the path that was recorded ({reason}); it keeps everything from there on, so its gradients "
            "are exact but its memory may exceed the budget. The next step of this kind is planned anew"
        )

    def _count_rerun(self) -> None:
        self._counts.reruns += 1

    def _refuse(self, obstacle: str) -> None:
        self._counts.unplanned += 1
        self._warn(f"{obstacle}: running without checkpointing")

    def _warn(self, message: str) -> None:
        """Say each thing once."""
        kind = message.split("(")[0]
        if kind not in self._counts.warned:
            self._counts.warned.add(kind)
            warnings.warn(f"recollect: {message}", RuntimeWarning, stacklevel=2)


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


def _taken_over() -> bool:
    """Whether an outer recording or tape sees every operator already."""
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(isinstance(mode, (Tape, Recorder)) for mode in stack)


def _obstacle() -> str:
    """Why a tape cannot run here; "" if it can."""
    if torch.compiler.is_compiling():
        return "called inside torch.compile"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "called inside a torch.func transform (grad, vmap, ...)"
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message():
        return "saved-tensor hooks are disabled here"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved-tensor hooks are active around the call, and they would not see what recollect keeps"
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
    modules = reachable_modules(fn, args, kwargs)
    flags = tuple(m.training for root in modules for m in root.modules())
    tensors = tuple(_tensor_signature(t) for _, _, t in named_tensors(modules))
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    return structure, tuple(_leaf_signature(x) for x in leaves), flags, tensors, autocast


def _tensor_signature(tensor: Tensor) -> tuple[Any, ...]:
    shape = None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return tensor.requires_grad, tensor.is_leaf and tensor.grad is not None, tensor.dtype, shape


def _leaf_signature(x: Any) -> Any:
    if isinstance(x, Tensor):
        stride = tuple(x.stride()) if x.layout is torch.strided else None
        grad = x.is_leaf and x.grad is not None
        return x.dtype, tuple(x.shape), stride, x.device, x.requires_grad, grad
    if isinstance(x, (int, float, str, bool, type(None), complex, bytes)):
        return type(x), x
    return id(x) if isinstance(x, nn.Module) else type(x)
