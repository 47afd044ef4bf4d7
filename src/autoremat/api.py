"""The functions that users call, from ``checkpoint`` to ``stats``.

They are ``checkpoint``, ``restore``, ``plan``, ``explain``, ``frontier`` and ``stats``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import torch
from torch import nn

from autoremat.checkpointed import (
    Forward,
    checkpoint_callable,
    checkpoint_module,
    compiled_of,
    plain_callable,
    session_of,
)
from autoremat.engines.torch.eager.dry_run import record as record_calls
from autoremat.engines.torch.eager.options import Given, Options
from autoremat.engines.torch.eager.stats import NOTHING_YET, Stats
from autoremat.engines.torch.operators.compiled import inside_compiled
from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.world.memory import free_bytes
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.engines.torch.world.tiers import TierOf
from autoremat.engines.torch.world.versions import warn_if_untested
from autoremat.planner import Frontier, solve
from autoremat.planner import frontier as frontier_of
from autoremat.planner.wishes import Patterns, Wishes
from autoremat.program import InfeasibleBudget, Plan, Program
from autoremat.program.units import Budget
from autoremat.refusals import check_alone, check_explained
from autoremat.show.explanation import Explanation, explanation_of
from autoremat.show.progress import progress_bar

F = TypeVar("F", bound=Callable[..., Any])
warn_if_untested(torch.__version__)  # here, so that it is said once, at the first use
TIMINGS: Final = ("auto", "measure", "estimate")
"""Names of the ways to find seconds and kernel scratch."""


@overload
def checkpoint(
    target: F, *, budget: Given | None = None, plan: Plan | str | Path | None = None, optimizer: Any = None,
    keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0, effort: float | None = None,
    measure: bool = False, offload: str | None = None, offload_budget: int | str | None = None,
) -> F: ...  # fmt: skip
@overload
def checkpoint(
    target: None = None, *, budget: Given | None = None, plan: Plan | str | Path | None = None, optimizer: Any = None,
    keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0, effort: float | None = None,
    measure: bool = False, offload: str | None = None, offload_budget: int | str | None = None,
) -> Callable[[F], F]: ...  # fmt: skip
def checkpoint(
    target: Any = None, *, budget: Given | None = None, plan: Plan | str | Path | None = None, optimizer: Any = None,
    keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0, effort: float | None = None,
    measure: bool = False, offload: str | None = None, offload_budget: int | str | None = None,
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
        effort: how much work a plan is worth, on any machine and whatever else that does: 1.0 is most of what fits into
            ten seconds of a quiet one. None: a tenth of ``time_limit_seconds``.
        measure: measure the peak of the second step of every plan, from the call to the optimizer's step or the next
            call, for ``stats``. On CPU that step runs under torch's profiler, in the main thread, and takes longer; on
            CUDA it resets the peak statistics of ``torch.cuda``. Without ``measure``, nothing is measured on CPU, and
            on CUDA only a step that raises those statistics.
        offload: where values may be moved to, as a third choice beside keeping and recomputing them: ``"disk:/path"``
            for a file in a folder, ``"host"`` for pinned memory beside a CUDA device, ``"auto"`` for the latter where
            there is such a device and the folder for temporary files elsewhere. A value moves only where the plan
            takes less time for it. None: nothing moves.
        offload_budget: the most bytes in that tier, such as ``"64GiB"``; 0 for none, None for no limit.

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
    wanted: Given = known.budget_bytes if known is not None else budget  # type: ignore[assignment]
    options = Options(
        wanted,
        optimizer,
        keep,
        recompute,
        time_limit_seconds,
        measure,
        known,
        shown=progress_bar,
        offload=offload,
        offload_budget=offload_budget,
        effort=effort,
    )
    if target is None:
        return functools.partial(checkpoint, **options.arguments)
    if not callable(target):
        raise TypeError(f"autoremat.checkpoint takes a module or a callable, got {type(target).__name__}")
    if session_of(target) is not None:
        raise ValueError("this is checkpointed by autoremat already; undo that first with autoremat.restore(...)")
    if isinstance(target, nn.Module):
        return checkpoint_module(target, options)
    return checkpoint_callable(target, options)


def restore(target: F) -> F:
    """Undo ``checkpoint``: return the module as it was, or the callable.

    Raises:
        ValueError: the target is not checkpointed by autoremat, or its forward has been wrapped since.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Linear(4, 4)
        >>> autoremat.restore(autoremat.checkpoint(model, budget="100%")) is model
        True
    """
    session = session_of(target)
    if session is None:
        raise ValueError("this is not checkpointed by autoremat, so there is nothing to restore")
    if not isinstance(target, nn.Module):
        return plain_callable(target)
    module = inside_compiled(target)
    forward = vars(module)["forward"]
    if not isinstance(forward, Forward):
        raise ValueError(
            f"the forward of this {type(module).__name__} has been wrapped once more since it was checkpointed (by "
            "Accelerate, say); undo that first"
        )
    del module.forward
    if forward.replaced is not None:
        module.forward = forward.replaced
    return target


def stats(target: Any) -> Stats:
    """Return what a checkpointed module or callable has done so far.

    That is its plan, calls, fallbacks, reruns, and the measured peak. ``as_dict()`` of the result has numbers only, for
    a logger.

    Raises:
        ValueError: the target is not checkpointed by autoremat.

    Example:
        >>> import torch, autoremat
        >>> model = autoremat.checkpoint(torch.nn.Linear(64, 64), budget="100%")
        >>> model(torch.randn(512, 64)).sum().backward()
        >>> autoremat.stats(model).as_dict()["calls"]
        1
    """
    session, compiled = session_of(target), compiled_of(target)
    if session is None and compiled is None:
        raise ValueError("this is not checkpointed by autoremat; call autoremat.checkpoint on it first")
    found = NOTHING_YET if session is None else session.stats()
    planner: Any = compiled.planner if session is None and compiled is not None else session.planner  # type: ignore[union-attr]
    if compiled is not None:
        figures = compiled.figures()
        more = {name: getattr(found, name) + figures.pop(name) for name in ("calls", "unplanned") if name in figures}
        found = replace(found, **figures, **more)
    if found.plan is None or not isinstance(planner, Options):
        return found
    return replace(found, plan=planner.with_floor(found.plan))


def plan(
    fn: Callable[..., Any],
    *args: Any,
    budget: Given,
    optimizer: Any = None,
    solver: str = "auto",
    keep: Patterns = (),
    recompute: Patterns = (),
    timing: str = "auto",
    time_limit_seconds: float = 10.0,
    effort: float | None = None,
    accumulate: bool = False,
    compiled: bool | str = False,
    offload: str | None = None,
    offload_budget: int | str | None = None,
    **kwargs: Any,
) -> Plan:
    """Plan a training step without running it.

    The account is that of ``checkpoint``: a budget that one accepts, the other accepts. The step is recorded on fake
    tensors: nothing of the model's or the activations' size is allocated. Operators that no process has measured on
    this device so far are run alone, one at a time, on random numbers.

    Args:
        fn: a module or callable, as for ``checkpoint``; its tensors may be real, fake, or on the ``meta`` device.
        *args: its positional arguments.
        budget: as for ``checkpoint``.
        optimizer: as for ``checkpoint``.
        solver: name of a solver (``autoremat.planner.SOLVERS``); ``"auto"`` takes the best of several.
        keep: as for ``checkpoint``.
        recompute: as for ``checkpoint``.
        timing: where seconds and kernel scratch come from. ``"auto"``: from what was measured before, on this device,
            by any process; where the tensors are real, other operators are measured, each distinct one alone, unless it
            takes more than half of what the device has left; for the rest, and for meta and fake tensors, the seconds
            are estimates. ``"measure"``: the same, however much that takes. ``"estimate"``: from FLOPs and bytes alone,
            the same on every machine; kernel scratch is not counted then, and ``checkpoint`` may need more.
        time_limit_seconds: the longest that planning may take, recording excluded. A plan that it cut short says so.
        effort: as for ``checkpoint``. With ``timing="estimate"`` and a time limit that does not cut, the same call
            gives the same plan, byte for byte, on any machine, however busy.
        accumulate: the step finds gradients of all parameters that its backward reaches, and adds to them: what
            gradient accumulation takes from the second micro-step on. A plan of it serves the first one, too.
        compiled: plan what ``torch.compile`` makes of the step: the name of a backend, or True for ``"inductor"``. The
            callable is traced and planned, and Inductor writes its kernels; no code is compiled, and nothing runs.
            ``solver``, ``timing``, ``accumulate`` and ``offload`` are not for this.
        offload: as for ``checkpoint``; the bandwidth is measured, once for each folder.
        offload_budget: as for ``checkpoint``.
        **kwargs: keyword arguments of ``fn``.

    Raises:
        ValueError: malformed budget, inputs on several devices, nothing differentiable, a pattern that matches nothing;
            with ``compiled``, a step that is compiled into several graphs.
        InfeasibleBudget: no known plan fits.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> plan = autoremat.plan(model, torch.randn(512, 64), budget="90%")
        >>> plan.peak_bytes <= 0.9 * plan.plain_peak_bytes
        True
    """
    Budget.read(budget)
    tier = TierOf(offload, offload_budget)
    if compiled:
        options = Options(budget, optimizer, keep, recompute, time_limit_seconds, effort=effort)
        return _plan_compiled(fn, args, kwargs, options, "inductor" if compiled is True else str(compiled))
    with progress_bar() as progress:
        program = record_step(fn, args, kwargs, optimizer, timing, progress, accumulate=accumulate)
        return solve(
            program, in_bytes(budget, program), solver=solver, wishes=Wishes(keep, recompute),
            time_limit_seconds=time_limit_seconds, effort=effort, progress=progress,
            link=tier.link() if tier.name else None,
        )  # fmt: skip


def _plan_compiled(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], options: Options, backend: str
) -> Plan:  # fmt: skip
    """Plan the step that ``torch.compile`` would run."""
    from autoremat.engines.torch.compiled.beforehand import planned_beforehand

    session = session_of(fn)
    plain = session.fn if session is not None else inside_compiled(fn) if isinstance(fn, nn.Module) else fn
    return planned_beforehand(plain, args, kwargs, options, backend).plan


def explain(
    step: Plan | Program | Callable[..., Any],
    *args: Any,
    budget: Given | None = None,
    optimizer: Any = None,
    keep: Patterns = (),
    recompute: Patterns = (),
    timing: str = "auto",
    time_limit_seconds: float = 10.0,
    accumulate: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Explain where the peak of a training step stands, and why.

    Nothing is run for it. Without a budget, this is about plain training: what it saves for the backward, and which
    modules would not be worth checkpointing by hand. With a budget it is about the plan: what the plan keeps, what it
    recomputes, how often, and from what.

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
    wishes = Wishes(keep, recompute)
    has_more = bool(args or kwargs or optimizer is not None or accumulate)
    check_explained(step, budget, wishes, has_more=has_more)
    if isinstance(step, Plan):
        return explanation_of(step.program, step)
    if budget is not None:
        Budget.read(budget)
    with progress_bar() as progress:
        program = _program_of(step, args, kwargs, optimizer, timing, progress, accumulate)
        if budget is None:
            return explanation_of(program)
        plan = solve(
            program, in_bytes(budget, program), wishes=wishes, time_limit_seconds=time_limit_seconds, progress=progress
        )
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
    offload: str | None = None,
    offload_budget: int | str | None = None,
    **kwargs: Any,
) -> Frontier:
    """Plan a whole range of budgets: overhead against peak.

    It shows what memory costs in time, before anything is run.

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
        offload: as for ``plan``; the table and the page then say what goes to the tier, too.
        offload_budget: as for ``plan``.
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
    tier = TierOf(offload, offload_budget)
    with progress_bar() as progress:
        program = _program_of(program_or_fn, args, kwargs, optimizer, timing, progress, accumulate)
        if tier.name:
            program = replace(program, link=tier.link())
        return frontier_of(
            program, points=points, wishes=Wishes(keep, recompute), time_limit_seconds=time_limit_seconds,
            progress=progress,
        )  # fmt: skip


def _program_of(
    step: Program | Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], optimizer: Any, timing: str,
    progress: Progress | None, accumulate: bool,
) -> Program:  # fmt: skip
    """Return the program itself, or record that of the callable."""
    if not isinstance(step, Program):
        return record_step(step, args, kwargs, optimizer, timing, progress, accumulate=accumulate)
    has_more = bool(args or kwargs or optimizer is not None or accumulate)
    check_alone(has_more, "arguments, optimizer and accumulate are for a module or a callable")
    return step


def record_step(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], optimizer: Any, timing: str,
    progress: Progress | None = None, device: str | None = None, name: str = "", *, accumulate: bool = False,
) -> Program:  # fmt: skip
    """Record the program of a step that will not be run."""
    if timing not in TIMINGS:
        raise ValueError(f"timing is one of {', '.join(map(repr, TIMINGS))}, not {timing!r}")
    session = session_of(fn)
    plain = session.fn if session is not None else fn
    state, scratch = optimizer_bytes(optimizer)
    return record_calls(
        plain, args, kwargs, optimizer_state_bytes=state, optimizer_scratch_bytes=scratch, timing=timing, device=device,
        progress=progress, name=name, accumulate=accumulate,
    )  # fmt: skip


def in_bytes(budget: Given, program: Program) -> Given:
    """Turn ``"auto"`` into bytes; leave other budgets as they are.

    The bytes are what is free on the device now, plus what the step's fixed values take already.
    """
    return free_bytes() + program.fixed_bytes if Budget.read(budget).is_auto else budget


__all__ = ["InfeasibleBudget", "checkpoint", "explain", "frontier", "plan", "restore", "stats"]
