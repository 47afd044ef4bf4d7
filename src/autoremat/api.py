"""What users call: ``checkpoint``, ``restore``, ``plan``, ``explain``, ``frontier``, ``stats``."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import torch
from torch import nn

from autoremat.engines.torch.eager.dry_run import record as record_calls
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.session import Session
from autoremat.engines.torch.eager.stats import Stats
from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.engines.torch.world.versions import warn_if_untested
from autoremat.planner import Frontier, parse_budget, solve
from autoremat.planner import frontier as frontier_of
from autoremat.planner.beside import Wanted
from autoremat.planner.constraints import Patterns, constrain, is_matched, still_possible
from autoremat.planner.search.floor import floor_of
from autoremat.program import InfeasibleBudget, Once, Plan, Program, simulate
from autoremat.show.explanation import Explanation, explanation_of
from autoremat.show.progress import progress_bar

F = TypeVar("F", bound=Callable[..., Any])
Budget = int | float | str
_MARK = "__autoremat__"
warn_if_untested(torch.__version__)  # here, so that it is said once, at the first use
TIMINGS: Final = ("auto", "measure", "estimate")
"""Where seconds and kernel scratch come from."""
TIGHT: Final = 0.1
"""The part of the time for a plan that is wanted at once, where the budget is too tight for the greedy."""


@overload
def checkpoint(
    target: F, *, budget: Budget | None = None, plan: Plan | str | Path | None = None, optimizer: Any = None,
    keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0, measure: bool = False,
) -> F: ...  # fmt: skip
@overload
def checkpoint(
    target: None = None, *, budget: Budget | None = None, plan: Plan | str | Path | None = None, optimizer: Any = None,
    keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0, measure: bool = False,
) -> Callable[[F], F]: ...  # fmt: skip
def checkpoint(
    target: Any = None, *, budget: Budget | None = None, plan: Plan | str | Path | None = None, optimizer: Any = None,
    keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0, measure: bool = False,
) -> Any:  # fmt: skip
    """Make a module or a callable train within a memory budget.

    The first call with a kind of input runs within the budget, too. While it runs, it is recorded; at the end of its
    forward, its operators are timed one by one, and a plan is made: which values stay in memory for the backward and
    which are computed again. From then on every call follows it. User code runs as often as it is called. Loss,
    gradients, buffers and random generators are bit for bit those of plain training.

    Args:
        target: a module, which stays the same object, or any callable that returns the loss or outputs (then a
            wrapped one is returned); left out, the result is a decorator.
        budget: the peak of the whole step, parameters, gradients and inputs included: ``"10GiB"``, ``"512MB"``, a
            number of bytes, a fraction of the plain peak (``0.5``, ``"50%"``), or ``"auto"`` (what the device has).
            What runs outside the callable is not seen: wrap a function that returns the loss to have all of it. A
            fraction is turned into bytes once, by the first plan; later inputs have as many.
        plan: in place of a budget a plan that ``autoremat.plan`` made of the largest input, or its JSON file: it is
            followed for that input and for all smaller ones, and its budget holds for whatever else comes.
        optimizer: an optimizer, or a list of those that take turns: its state is resident, and its step, temporaries
            included, has to fit, too. Or the bytes of the state alone.
        keep: patterns (``fnmatch``) on module paths or operator names, such as ``"blocks.0.*"`` or
            ``("aten.bernoulli*", "head")``; what these operators make is never computed again.
        recompute: the same; what these operators make does not stay from the forward into the backward.
        time_limit_seconds: the longest that making a plan may take, recording excluded.
        measure: measure the peak of the second step of every plan, from the call to the optimizer's step or the next
            call, for ``stats``. On CPU that step runs under torch's profiler, in the main thread, and takes longer; on
            CUDA it resets the peak statistics of ``torch.cuda``. Without ``measure``, nothing is measured on CPU, and
            on CUDA only a step that raises those statistics.

    Returns:
        The same module, or the wrapped callable.

    Raises:
        ValueError: a malformed budget, a module without trainable parameters or one that is checkpointed already; at
            the first call, a pattern that matches nothing.
        InfeasibleBudget: at the end of the first call, when no plan fits; names the smallest budget that does. At a
            later call that finds more (gradients that stayed, a larger input); names what has come, too.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> model = autoremat.checkpoint(model, budget=0.9)
        >>> model(torch.randn(512, 64)).sum().backward()
        >>> autoremat.stats(model).plan.peak_bytes <= autoremat.stats(model).plan.budget_bytes
        True
    """
    if (budget is None) == (plan is None):
        raise ValueError(
            "give either a budget or a plan made with one (autoremat.plan(model, *largest_input, budget=...))"
        )
    known = plan if plan is None or isinstance(plan, Plan) else Plan.from_json(Path(plan))
    wanted: Budget = known.budget_bytes if known is not None else budget  # type: ignore[assignment]
    _check_budget(wanted)
    options = Options(wanted, optimizer, keep, recompute, time_limit_seconds, measure, known)
    if target is None:
        return functools.partial(checkpoint, **options.wishes)
    if not callable(target):
        raise TypeError(f"autoremat.checkpoint takes a module or a callable, got {type(target).__name__}")
    if session_of(target) is not None:
        raise ValueError("this is checkpointed by autoremat already; undo that first with autoremat.restore(...)")
    if isinstance(target, nn.Module):
        return _checkpoint_module(target, options)
    return _checkpoint_callable(target, options)


def restore(target: F) -> F:
    """Undo ``checkpoint``: the module as it was, or the callable that was wrapped.

    Raises:
        ValueError: the target is not checkpointed by autoremat, or its forward has been wrapped since.
    """
    session = session_of(target)
    if session is None:
        raise ValueError("this is not checkpointed by autoremat, so there is nothing to restore")
    if not isinstance(target, nn.Module):
        return session.fn  # type: ignore[return-value]
    forward = vars(target)["forward"]
    if not isinstance(forward, _Forward):
        raise ValueError(
            f"the forward of this {type(target).__name__} has been wrapped once more since it was checkpointed (by "
            "Accelerate, say); undo that first"
        )
    del target.forward
    if forward.replaced is not None:
        target.forward = forward.replaced
    return target


def stats(target: Any) -> Stats:
    """What a checkpointed module or callable has done so far: plan, calls, fallbacks, reruns, the measured peak.

    ``as_dict()`` of it has numbers only, for a logger.

    Raises:
        ValueError: the target is not checkpointed by autoremat.

    Example:
        >>> import torch, autoremat
        >>> model = autoremat.checkpoint(torch.nn.Linear(64, 64), budget="100%")
        >>> model(torch.randn(512, 64)).sum().backward()
        >>> autoremat.stats(model).as_dict()["calls"]
        1
    """
    session = session_of(target)
    if session is None:
        raise ValueError("this is not checkpointed by autoremat; call autoremat.checkpoint on it first")
    found, planner = session.stats(), session.planner
    if found.plan is None or not isinstance(planner, Options):
        return found
    return replace(found, plan=planner.with_floor(found.plan))


def plan(
    fn: Callable[..., Any],
    *args: Any,
    budget: Budget,
    optimizer: Any = None,
    solver: str = "auto",
    keep: Patterns = (),
    recompute: Patterns = (),
    timing: str = "auto",
    time_limit_seconds: float = 10.0,
    accumulate: bool = False,
    **kwargs: Any,
) -> Plan:
    """Plan a training step without running it, in the account of ``checkpoint``: what one accepts, the other does.

    The step is recorded on fake tensors: nothing of the model's or the activations' size is allocated. Operators that
    no process has measured on this device so far are run alone, one at a time, on random numbers.

    Args:
        fn: a module or callable, as for ``checkpoint``; its tensors may be real, fake, or on the ``meta`` device.
        *args: its positional arguments.
        budget: as for ``checkpoint``.
        optimizer: as for ``checkpoint``.
        solver: name of a solver (``autoremat.planner.SOLVERS``); ``"auto"`` takes the best of several.
        keep: as for ``checkpoint``.
        recompute: as for ``checkpoint``.
        timing: where seconds and kernel scratch come from. ``"auto"``: from what was measured before, on this device,
            by any process; where the tensors are real, other operators are measured, each distinct one alone, unless
            it takes more than half of what the device has left; for the rest, and for meta and fake tensors, the
            seconds are estimates. ``"measure"``: the same, however much that takes. ``"estimate"``: from FLOPs and
            bytes alone, the same on every machine; kernel scratch is not counted then, and ``checkpoint`` may need
            more.
        time_limit_seconds: the longest that planning may take, recording excluded.
        accumulate: the step finds gradients of all parameters that its backward reaches, and adds to them: what
            gradient accumulation takes from the second micro-step on. A plan of it serves the first one, too.
        **kwargs: keyword arguments of ``fn``.

    Raises:
        ValueError: malformed budget, inputs on several devices, nothing differentiable, a pattern that matches nothing.
        InfeasibleBudget: no known plan fits.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> plan = autoremat.plan(model, torch.randn(512, 64), budget="90%")
        >>> plan.peak_bytes <= 0.9 * plan.plain_peak_bytes
        True
    """
    _check_budget(budget)
    with progress_bar() as progress:
        program = record_step(fn, args, kwargs, optimizer, timing, progress, accumulate=accumulate)
        return solve(
            program, in_bytes(budget, program.fixed_bytes), solver=solver, keep=keep, recompute=recompute,
            time_limit_seconds=time_limit_seconds, progress=progress,
        )  # fmt: skip


def explain(
    step: Plan | Program | Callable[..., Any],
    *args: Any,
    budget: Budget | None = None,
    optimizer: Any = None,
    keep: Patterns = (),
    recompute: Patterns = (),
    timing: str = "auto",
    time_limit_seconds: float = 10.0,
    accumulate: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Where the peak of a training step stands and what fills it, before anything is run.

    Without a budget, that of plain training, with what it saves for the backward and which modules would not be worth
    checkpointing by hand; with one, that of the plan, with what it keeps, what it computes again, how often, from what.

    Args:
        step: a module or callable, as for ``plan``; a program; or a plan.
        *args: the callable's positional arguments.
        budget: as for ``plan``; None explains plain training. Not beside a plan, which has one.
        optimizer: as for ``plan``; of a callable only.
        keep: as for ``plan``; together with a budget.
        recompute: as for ``plan``; together with a budget.
        timing: as for ``plan``; of a callable only.
        time_limit_seconds: the longest that planning may take, recording excluded.
        accumulate: as for ``plan``; of a callable only.
        **kwargs: keyword arguments of the callable.

    Returns:
        ``categories``, ``modules``, ``residents``, ``savings``, ``blocks``; ``str()`` is a page of tables. Each
        breakdown adds up to ``peak_bytes``, to the byte.

    Raises:
        TypeError: arguments beside a program or a plan, a budget beside a plan, constraints without a budget.
        ValueError: as ``plan``.
        InfeasibleBudget: no known plan fits.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> why = autoremat.explain(model, torch.randn(512, 64))
        >>> sum(why.categories.values()) == why.peak_bytes
        True
    """
    if budget is None and (keep or recompute):
        raise TypeError("keep= and recompute= are wishes for a plan: give a budget with them")
    if isinstance(step, Plan):
        if args or kwargs or optimizer is not None or accumulate or budget is not None:
            raise TypeError("a plan stands for itself: its program and its budget are in it")
        return explanation_of(step.program, step)
    if budget is not None:
        _check_budget(budget)
    with progress_bar() as progress:
        program = _program_of(step, args, kwargs, optimizer, timing, progress, accumulate)
        if budget is None:
            return explanation_of(program)
        plan = solve(
            program, in_bytes(budget, program.fixed_bytes), keep=keep, recompute=recompute,
            time_limit_seconds=time_limit_seconds, progress=progress,
        )  # fmt: skip
        return explanation_of(program, plan)


def frontier(
    program_or_fn: Program | Callable[..., Any],
    *args: Any,
    points: int | Sequence[int | float | str] = 16,
    optimizer: Any = None,
    keep: Patterns = (),
    recompute: Patterns = (),
    timing: str = "auto",
    time_limit_seconds: float = 60.0,
    accumulate: bool = False,
    **kwargs: Any,
) -> Frontier:
    """Overhead against peak over the whole range of budgets: what memory costs in time, before anything is run.

    Args:
        program_or_fn: a program, or a module or callable, as for ``plan``.
        *args: the callable's positional arguments.
        points: how many budgets, the floor and the plain peak included, closer together towards the floor; or the
            budgets themselves.
        optimizer: as for ``plan``; of a callable only.
        keep: as for ``plan``.
        recompute: as for ``plan``.
        timing: as for ``plan``; of a callable only.
        time_limit_seconds: the longest that planning may take, all budgets together, recording excluded.
        accumulate: as for ``plan``; of a callable only.
        **kwargs: keyword arguments of the callable.

    Returns:
        ``points``, one plan per budget; ``plan_at(budget)``; ``str()`` is a table; ``plot(path)`` draws it.

    Raises:
        TypeError: arguments beside a program.
        ValueError: as ``plan``; fewer than two points.
        InfeasibleBudget: one of the budgets named is below the floor.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> frontier = autoremat.frontier(model, torch.randn(512, 64), points=4)
        >>> [p.overhead for p in frontier.points] == sorted((p.overhead for p in frontier.points), reverse=True)
        True
    """
    with progress_bar() as progress:
        program = _program_of(program_or_fn, args, kwargs, optimizer, timing, progress, accumulate)
        return frontier_of(
            program, points=points, keep=keep, recompute=recompute, time_limit_seconds=time_limit_seconds,
            progress=progress,
        )  # fmt: skip


def _program_of(
    step: Program | Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], optimizer: Any, timing: str,
    progress: Progress | None, accumulate: bool,
) -> Program:  # fmt: skip
    """The program itself, or that of the callable."""
    if not isinstance(step, Program):
        return record_step(step, args, kwargs, optimizer, timing, progress, accumulate=accumulate)
    if args or kwargs or optimizer is not None or accumulate:
        raise TypeError(
            "a program stands for itself: arguments, optimizer and accumulate are for a module or a callable"
        )
    return step


def record_step(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], optimizer: Any, timing: str,
    progress: Progress | None = None, device: str | None = None, name: str = "", *, accumulate: bool = False,
) -> Program:  # fmt: skip
    """The program of a step that is not going to be run."""
    if timing not in TIMINGS:
        raise ValueError(f"timing is one of {', '.join(map(repr, TIMINGS))}, not {timing!r}")
    session = session_of(fn)
    plain = session.fn if session is not None else fn
    state, scratch = optimizer_bytes(optimizer)
    return record_calls(
        plain, args, kwargs, optimizer_state_bytes=state, optimizer_scratch_bytes=scratch, timing=timing, device=device,
        progress=progress, name=name, accumulate=accumulate,
    )  # fmt: skip


class Options:
    """What a user asked of ``checkpoint``; makes the plans."""

    def __init__(
        self, budget: Budget, optimizer: Any, keep: Patterns, recompute: Patterns, time_limit_seconds: float,
        measure: bool = False, given: Plan | None = None,
    ) -> None:  # fmt: skip
        self.given = given
        self.budget, self.optimizer, self.time_limit_seconds = budget, optimizer, time_limit_seconds
        self.keep, self.recompute, self.measure = keep, recompute, measure
        self._settled_bytes: int | None = None
        """What a share of the plain peak has come to, at the first plan: later kinds of input have as much."""
        self._floor: tuple[weakref.ref[Program], int] | None = None
        """The floor that was looked for last."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model needs the bytes of the optimizer, not the optimizer."""
        return vars(self) | {"optimizer": optimizer_bytes(self.optimizer), "_settled_bytes": None, "_floor": None}

    @property
    def wishes(self) -> dict[str, Any]:
        """The arguments of ``checkpoint``."""
        wishes = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        given = wishes.pop("given")
        return wishes if given is None else wishes | {"budget": None, "plan": given}

    def first(self, fixed_bytes: int) -> Callable[[int], float]:
        """What a first step may take beside what is there for good, given what plain training would take by then.

        A share of the plain peak is not known before the step has been recorded; by then what is held is at most that
        share of what plain training would hold.
        """
        fixed_bytes += optimizer_bytes(self.optimizer)[0]
        budget = self._budget(fixed_bytes)
        whole = parse_budget(budget, 1 << 60)
        if not _is_share(budget):
            return lambda plain_bytes: whole - fixed_bytes
        if whole >= 1 << 60:
            return lambda plain_bytes: math.inf
        return lambda plain_bytes: parse_budget(budget, fixed_bytes + plain_bytes) - fixed_bytes

    def is_kept(self, module: str, name: str) -> bool:
        """Whether the user wants what an operator of this module and name makes kept."""
        return bool(self.keep) and is_matched(self.keep, module, name)

    def assembled(self, first: FirstStep) -> Program:
        """The program of a first step, operators measured within the budget."""
        with progress_bar() as progress:
            state, scratch = optimizer_bytes(self.optimizer)
            return first.program(
                optimizer_state_bytes=state, optimizer_scratch_bytes=scratch, progress=progress, limit=self._in_bytes
            )

    def budget_bytes(self, program: Program, plain_peak_bytes: int, *, anew: bool = False) -> int:
        """The budget, where plain training has this peak.

        A share of a peak is settled by the first plan; ``anew``: by more than that one knew of.
        """
        nbytes = self.share_bytes(program, plain_peak_bytes)
        if not _is_share(in_bytes(self.budget, program.fixed_bytes)):
            return nbytes
        if self._settled_bytes is None or (anew and nbytes > self._settled_bytes):
            self._settled_bytes = nbytes
        return self._settled_bytes

    def share_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        """What the budget would be if this was the first plan."""
        return parse_budget(in_bytes(self.budget, program.fixed_bytes), plain_peak_bytes)

    def _budget(self, fixed_bytes: int) -> Budget:
        return in_bytes(self.budget, fixed_bytes) if self._settled_bytes is None else self._settled_bytes

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        """A plan within so many bytes, found in so many seconds; None: the first that is found, floor unknown."""
        is_first = seconds is None
        wanted = self.wanted(program, budget, TIGHT * self.time_limit_seconds if seconds is None else seconds)
        with progress_bar() as progress:
            return solve(
                program, budget, keep=wanted.keep, recompute=wanted.recompute, time_limit_seconds=wanted.seconds,
                progress=progress, first=is_first,
            )  # fmt: skip

    def wanted(self, program: Program, budget: int, seconds: float) -> Wanted:
        """The same plan, to be looked for elsewhere."""
        found_out = any(op.once in (Once.MADE_IS_CHANGED, Once.DIFFERS) for op in program.ops)
        recompute = still_possible(program, self.recompute) if found_out else self.recompute
        return Wanted(program, budget, min(seconds, self.time_limit_seconds), self.keep, recompute)

    def with_floor(self, plan: Plan) -> Plan:
        """The plan with the smallest budget that is accepted; a first plan was made without looking for that."""
        known = None if self._floor is None or self._floor[0]() is not plan.program else self._floor[1]
        if known is None:
            wanted = self.wanted(plan.program, plan.budget_bytes, 0.0)
            limited = wanted.keep or wanted.recompute
            program = constrain(plan.program, wanted.keep, wanted.recompute) if limited else plan.program
            known = min(plan.floor_bytes, floor_of(program).nbytes)
            self._floor = weakref.ref(plan.program), known
        return plan if plan.floor_bytes == known else replace(plan, floor_bytes=known)

    def _in_bytes(self, program: Program) -> int:
        return parse_budget(self._budget(program.fixed_bytes), simulate(program).peak_bytes)


_OF_A_METHOD: Final = frozenset(
    {"__closure__", "__code__", "__defaults__", "__func__", "__globals__", "__kwdefaults__", "__self__"}
)


class _Forward:
    """Stands in for ``forward`` on one module; goes along when the module is copied or pickled."""

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self.replaced = vars(module).get("forward")
        self._wrap()

    def _wrap(self) -> None:
        plain = self.replaced or types.MethodType(type(self.module).forward, self.module)
        functools.update_wrapper(self, type(self.module).forward, updated=())
        self.__wrapped__ = plain  # already bound: the signature is that of a call
        self.session = Session(_PlainForward(self.module, plain), self.options, measure=self.options.measure)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.session.call(args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """To ``inspect.ismethod``, and to nobody else, a method: so TorchScript finds the code that it compiles."""
        asks = sys._getframe(1).f_code
        return types.MethodType if asks is inspect.ismethod.__code__ else _Forward

    def __getattr__(self, name: str) -> Any:
        """What a bound method has and this has not: for ``torch.jit.script`` and ``torch.export``, which read code."""
        if name not in _OF_A_METHOD or "module" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(types.MethodType(type(self.module).forward, self.module), name)

    def __getstate__(self) -> dict[str, Any]:
        """Plans stay behind: they are made anew where they are needed."""
        return {"module": self.module, "options": self.options, "replaced": self.replaced}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wrap()


class _PlainForward:
    """A module's own forward, with the module in sight of the recorder."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self._forward = module, forward
        self.__name__ = type(module).__name__

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the forward, for messages that name an argument."""
        return inspect.signature(self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def _checkpoint_module(module: nn.Module, options: Options) -> nn.Module:
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has no parameters that require grad, so there is no backward pass to save memory "
            "for; to checkpoint a computation on inputs that require grad, wrap a function instead of the module"
        )
    module.forward = _Forward(module, options)
    return module


def _checkpoint_callable(fn: Callable[..., Any], options: Options) -> Callable[..., Any]:
    session = Session(fn, options, measure=options.measure)

    @functools.wraps(fn)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return session.call(args, kwargs)

    setattr(checkpointed, _MARK, session)
    return checkpointed


def session_of(target: Any) -> Session | None:
    """What a checkpointed module or callable runs under; None for all others."""
    if isinstance(target, nn.Module):
        forward = vars(target).get("forward")
        while forward is not None and not isinstance(forward, _Forward):
            forward = getattr(forward, "__wrapped__", None)  # a library may have wrapped it once more
        return forward.session if isinstance(forward, _Forward) and forward.module is target else None
    session = getattr(target, _MARK, None)
    return session if isinstance(session, Session) else None


def _check_budget(budget: Budget) -> None:
    """Refuse a malformed budget at the door."""
    if budget != "auto":
        parse_budget(budget, 1 << 62)


def _is_share(budget: Budget) -> bool:
    """Whether a budget is a share of the plain peak."""
    return parse_budget(budget, 1 << 60) != parse_budget(budget, 1 << 59)


def in_bytes(budget: Budget, fixed_bytes: int) -> Budget:
    """``"auto"`` as bytes: what is free on the device now, plus what the step's fixed values take already."""
    if budget != "auto":
        return budget
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(0.95 * (free + reserved)) + fixed_bytes
    return int(0.95 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) + fixed_bytes


__all__ = ["InfeasibleBudget", "checkpoint", "explain", "frontier", "plan", "restore", "stats"]
