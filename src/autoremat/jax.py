"""autoremat for JAX: ``checkpoint``, ``fit``, ``plan``, ``explain``, ``frontier``, ``max_batch``.

A function is recorded on types and shapes, planned, and given a gradient that follows the plan; XLA compiles that like
any other code. This module never imports torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TypeVar, overload

if find_spec("jax") is None:
    raise ModuleNotFoundError(
        "autoremat.jax needs an engine, and jax is not installed; run: pip install 'autoremat[jax]'", name="jax"
    )

from autoremat.engines.jax.compiler import BarriersRemoved, Memory, compiler_options, keeps_barriers, memory
from autoremat.engines.jax.fitting import Fitted, fitted
from autoremat.engines.jax.hosting import link_of
from autoremat.engines.jax.planning import Asked, Given, budget_bytes
from autoremat.engines.jax.steps import record_step
from autoremat.engines.jax.variants import Variants
from autoremat.engines.jax.wrapping import checkpointed
from autoremat.planner import Frontier
from autoremat.planner import frontier as frontier_of
from autoremat.planner.frontiers import frontier_of_plans
from autoremat.planner.wishes import Patterns, Wishes
from autoremat.program import InfeasibleBudget, Plan, Program
from autoremat.program.units import Budget
from autoremat.refusals import check_alone, check_explained
from autoremat.show.explanation import Explanation, explanation_of
from autoremat.sizes import MaxBatch, check_limits, largest

__all__ = [
    "BarriersRemoved",
    "Fitted",
    "InfeasibleBudget",
    "Memory",
    "checkpoint",
    "compiler_options",
    "explain",
    "fit",
    "frontier",
    "keeps_barriers",
    "max_batch",
    "memory",
    "plan",
]

F = TypeVar("F", bound=Callable[..., Any])


@overload
def checkpoint(
    fn: F, *, budget: Given | None = None, static_argnums: int | Sequence[int] = (), keep: Patterns = (),
    recompute: Patterns = (), time_limit_seconds: float = 10.0, offload: str | None = None,
    offload_budget: int | str | None = None, effort: float | None = None,
) -> F: ...  # fmt: skip
@overload
def checkpoint(
    fn: None = None, *, budget: Given | None = None, static_argnums: int | Sequence[int] = (), keep: Patterns = (),
    recompute: Patterns = (), time_limit_seconds: float = 10.0, offload: str | None = None,
    offload_budget: int | str | None = None, effort: float | None = None,
) -> Callable[[F], F]: ...  # fmt: skip
def checkpoint(
    fn: Any = None, *, budget: Given | None = None, static_argnums: int | Sequence[int] = (), keep: Patterns = (),
    recompute: Patterns = (), time_limit_seconds: float = 10.0, offload: str | None = None,
    offload_budget: int | str | None = None, effort: float | None = None,
) -> Any:  # fmt: skip
    """Make the gradient of a function fit into a memory budget.

    The result is called and differentiated like the function: under ``jax.grad``, ``jax.value_and_grad``, ``jax.jit``,
    ``jax.vmap``, ``jax.shard_map``, and the gradients of Flax and Equinox. When JAX traces it for a gradient, function
    and gradient are recorded on types and shapes and planned: what stays for the backward, and what is computed again,
    when. The same operations run on the same numbers, so gradients are equal but for XLA's rounding. What JAX traces
    again is planned again; the same step is planned once.

    The plan counts bytes as XLA would, which is an estimate: ``fit`` compiles, reads XLA's own account, and tightens.
    It sees the shapes that JAX shows it: one example under ``vmap`` around it, one shard under ``shard_map``, the whole
    array where ``jit`` is given sharded arrays. On CPU, compile with ``compiler_options()``: a warning says so.

    Args:
        fn: any function of pytrees that JAX can differentiate, with or without auxiliary outputs; left out, the result
            is a decorator. Arrays that it closes over are arguments like the others.
        budget: the peak of function and gradient, arguments and gradients included: ``"10GiB"``, ``"512MB"``, a number
            of bytes, or a fraction of the plain peak (``0.5``, ``"50%"``). Left out, ``fit`` finds it.
        static_argnums: positions of arguments that are handed on untouched. Whatever is no array is so anyway.
        keep: patterns (``fnmatch``) on named scopes or operations; what these make is never computed again.
        recompute: the same; what these make does not stay from the forward into the backward.
        time_limit_seconds: the longest that making a plan may take.
        effort: how much work a plan is worth, on any machine and whatever else that does: 1.0 is most of what fits into
            ten seconds of a quiet one. None: a tenth of ``time_limit_seconds``.
        offload: ``"host"`` lets values move to the memory of the host as a third choice, where the backend has one
            apart from its own; refused on CPU. Written and not yet run on a device; XLA decides when copies begin.
        offload_budget: the most bytes there, such as ``"64GiB"``; None for no limit.

    Raises:
        ValueError: a budget that cannot be read, a tier that is none or that the backend does not have. When the
            function is traced: no budget outside of ``fit``, an effect (``jax.debug.print``), a pattern that matches
            nothing.
        TypeError: when traced, a function that changes an argument in place, or forward mode.
        InfeasibleBudget: when traced, no known plan fits; names the smallest budget that does.

    Example:
        >>> import jax, jax.numpy as jnp, warnings, autoremat.jax
        >>> def loss(weights, x):
        ...     for w in weights:
        ...         x = jnp.tanh(x @ w)
        ...     return x.sum()
        >>> weights, x = [jnp.eye(64)] * 8, jnp.ones((512, 64))
        >>> warnings.simplefilter("ignore", autoremat.jax.BarriersRemoved)  # the options keep them
        >>> gradient = jax.grad(autoremat.jax.checkpoint(loss, budget="80%"))
        >>> step = jax.jit(gradient, compiler_options=autoremat.jax.compiler_options())
        >>> len(step(weights, x))
        8
    """
    if budget is not None:
        _read(budget)
    if fn is None:
        return functools.partial(
            checkpoint, budget=budget, static_argnums=static_argnums, keep=keep, recompute=recompute,
            time_limit_seconds=time_limit_seconds, offload=offload, offload_budget=offload_budget, effort=effort,
        )  # fmt: skip
    link = link_of(offload, offload_budget)
    if not callable(fn):
        raise TypeError(f"autoremat.jax.checkpoint takes a function, got {type(fn).__name__}")
    if hasattr(fn, "__wrapped_by_autoremat__"):
        raise ValueError(f"{getattr(fn, '__name__', 'this')} is checkpointed by autoremat already")
    static = (static_argnums,) if isinstance(static_argnums, int) else tuple(static_argnums)
    return checkpointed(fn, Asked(budget, Wishes(keep, recompute), time_limit_seconds, link, effort), static)


def plan(
    fn: Callable[..., Any],
    *args: Any,
    budget: Given,
    argnums: int | Sequence[int] = 0,
    keep: Patterns = (),
    recompute: Patterns = (),
    time_limit_seconds: float = 10.0,
    effort: float | None = None,
    **kwargs: Any,
) -> Plan:
    """Plan the gradient of a function without running anything.

    Args:
        fn: as for ``checkpoint``; checkpointed or not.
        *args: its positional arguments, or ``jax.ShapeDtypeStruct`` in their place.
        budget: as for ``checkpoint``.
        argnums: positions of the arguments to differentiate, as for ``jax.grad``.
        keep: as for ``checkpoint``.
        recompute: as for ``checkpoint``.
        time_limit_seconds: the longest that planning may take, recording excluded.
        effort: as for ``checkpoint``.
        **kwargs: keyword arguments of the function.

    Raises:
        ValueError: a budget that cannot be read, nothing to differentiate, an effect, a pattern that matches nothing.
        InfeasibleBudget: no known plan fits.

    Example:
        >>> import jax, jax.numpy as jnp, autoremat.jax
        >>> def loss(weights, x):
        ...     for w in weights:
        ...         x = jnp.tanh(x @ w)
        ...     return x.sum()
        >>> shape = jax.ShapeDtypeStruct((64, 64), "float32")
        >>> plan = autoremat.jax.plan(loss, [shape] * 8, jax.ShapeDtypeStruct((512, 64), "float32"), budget="80%")
        >>> plan.peak_bytes <= 0.8 * plan.plain_peak_bytes
        True
    """
    _read(budget)
    asked = Asked(budget, Wishes(keep, recompute), time_limit_seconds, effort=effort)
    return _plan_of(record_step(fn, args, kwargs, argnums), asked)


def explain(
    step: Plan | Program | Callable[..., Any],
    *args: Any,
    budget: Given | None = None,
    argnums: int | Sequence[int] = 0,
    keep: Patterns = (),
    recompute: Patterns = (),
    time_limit_seconds: float = 10.0,
    **kwargs: Any,
) -> Explanation:
    """Explain where the peak of a function's gradient stands, and why.

    Without a budget that of plain differentiation, with one that of the plan.

    Args:
        step: a function, as for ``plan``; a program; or a plan.
        *args: as for ``plan``.
        budget: as for ``plan``; None explains plain differentiation.
        argnums: as for ``plan``.
        keep: as for ``plan``; together with a budget.
        recompute: as for ``plan``; together with a budget.
        time_limit_seconds: the longest that planning may take, recording excluded.
        **kwargs: keyword arguments of the function.

    Raises:
        TypeError: arguments beside a program or a plan, a budget beside a plan, constraints without a budget.
        ValueError: as ``plan``.
        InfeasibleBudget: no known plan fits.

    Example:
        >>> import jax, jax.numpy as jnp, autoremat.jax
        >>> why = autoremat.jax.explain(lambda w, x: jnp.tanh(x @ w).sum(), jnp.eye(64), jnp.ones((512, 64)))
        >>> sum(why.categories.values()) == why.peak_bytes
        True
    """
    check_explained(step, budget, Wishes(keep, recompute), has_more=bool(args or kwargs))
    if isinstance(step, Plan):
        return explanation_of(step.program, step)
    if budget is not None:
        _read(budget)
    asked = Asked(budget, Wishes(keep, recompute), time_limit_seconds)
    if isinstance(step, Program):
        program = _program_of(step, args, kwargs, argnums)
        plan = None if budget is None else asked.solve(program, budget_bytes(budget, program))
        return explanation_of(program, plan)
    variants = record_step(step, args, kwargs, argnums)
    if budget is None:
        return explanation_of(variants.plain.program)
    plan = _plan_of(variants, asked)
    return explanation_of(plan.program, plan)


def frontier(
    program_or_fn: Program | Callable[..., Any],
    *args: Any,
    points: int | Sequence[Given] = 16,
    argnums: int | Sequence[int] = 0,
    keep: Patterns = (),
    recompute: Patterns = (),
    time_limit_seconds: float = 60.0,
    **kwargs: Any,
) -> Frontier:
    """Trace overhead against peak over all budgets, before anything runs.

    Args:
        program_or_fn: a program, or a function, as for ``plan``.
        *args: as for ``plan``.
        points: how many budgets, the floor and the plain peak included; or the budgets themselves.
        argnums: as for ``plan``.
        keep: as for ``plan``.
        recompute: as for ``plan``.
        time_limit_seconds: the longest that planning may take, all budgets together, recording excluded.
        **kwargs: keyword arguments of the function.

    Raises:
        TypeError: arguments beside a program.
        ValueError: as ``plan``; fewer than two points.
        InfeasibleBudget: one of the budgets named is below the floor.

    Example:
        >>> import jax, jax.numpy as jnp, autoremat.jax
        >>> def loss(weights, x):
        ...     for w in weights:
        ...         x = jnp.tanh(x @ w)
        ...     return x.sum()
        >>> frontier = autoremat.jax.frontier(loss, [jnp.eye(64)] * 4, jnp.ones((512, 64)), points=3)
        >>> [p.overhead for p in frontier.points] == sorted((p.overhead for p in frontier.points), reverse=True)
        True
    """
    wishes = Wishes(keep, recompute)
    if isinstance(program_or_fn, Program):
        program = _program_of(program_or_fn, args, kwargs, argnums)
        return frontier_of(program, points=points, wishes=wishes, time_limit_seconds=time_limit_seconds)
    step = record_step(program_or_fn, args, kwargs, argnums)
    if not step.has_scans:
        return frontier_of(step.plain.program, points=points, wishes=wishes, time_limit_seconds=time_limit_seconds)
    n = points if isinstance(points, int) else len(points)
    asked = Asked(None, wishes, time_limit_seconds / max(n, 1))
    return frontier_of_plans(
        lambda nbytes: step.planned(nbytes, asked).plan, step.plain.program, step.floor_bytes(asked), points
    )


def fit(
    step: Callable[..., Any],
    *args: Any,
    budget: int | str,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None,
    most_tries: int = 4,
) -> Fitted:
    """Compile a whole train step within a budget, by XLA's own account.

    The step is compiled as plain training first. What it takes beyond the budget its checkpointed functions are to
    save: they are planned again, the step is compiled again, its memory is read, until it fits. The best step that fits
    is kept, and none above the budget is ever returned.

    Args:
        step: the train step. It differentiates a function that went through ``checkpoint`` without a budget (a budget
            given there is not looked at here). What went through ``jax.jit`` is compiled with the options given there.
        *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.
        budget: of the step in all, arguments, outputs and temporaries: bytes, or a size such as ``"10GiB"``; on several
            devices, of each.
        donate_argnums: as for ``jax.jit``; the state that the step replaces is there twice otherwise.
        static_argnums: as for ``jax.jit``.
        compiler_options: further ones, as for ``jax.jit``. Those that keep barriers are added where they are needed.
        most_tries: how many further steps are compiled; the last one by the smallest plan, where nothing fits by then.

    Returns:
        ``fitted(*args)`` runs the step; ``fitted.memory`` is XLA's account, ``fitted.plans`` what was planned, and
        ``print(fitted)`` lists every try.

    Raises:
        InfeasibleBudget: no step that was compiled fits; names the smallest total that was measured.
        ValueError: a budget that cannot be read or is a share; nothing in the step is checkpointed.

    Example:
        >>> import jax, jax.numpy as jnp, autoremat.jax
        >>> def loss(weights, x):
        ...     for w in weights:
        ...         x = jnp.tanh(x @ w)
        ...     return x.sum()
        >>> loss = autoremat.jax.checkpoint(loss)
        >>> def train_step(weights, x):
        ...     return [w - 0.1 * g for w, g in zip(weights, jax.grad(loss)(weights, x))]
        >>> weights, x = [jnp.eye(64)] * 8, jnp.ones((512, 64))
        >>> step = autoremat.jax.fit(train_step, weights, x, budget="1.5MB", donate_argnums=0)
        >>> step.memory.total_bytes <= 1_500_000
        True
    """
    found = Budget.read(_read(budget))
    if found.nbytes is None:
        raise ValueError(f"fit needs a budget in bytes, not {budget!r}: what plain training takes, only XLA can tell")
    given = {"donate_argnums": donate_argnums, "static_argnums": static_argnums}
    jit_options = {name: positions for name, positions in given.items() if positions != ()}
    return fitted(step, args, found.nbytes, jit_options, compiler_options or {}, most_tries)


def max_batch(
    fn: Callable[..., Any],
    make_args: Callable[[int], Sequence[Any]],
    *,
    budget: int | str,
    overhead: float = 0.5,
    start: int = 1,
    most: int = 1 << 24,
    argnums: int | Sequence[int] = 0,
    keep: Patterns = (),
    recompute: Patterns = (),
    time_limit_seconds: float = 5.0,
) -> MaxBatch:
    """Find the largest ``n`` whose gradient step has a plan.

    It is the gradient of ``fn(*make_args(n))``, and the plan is within the budget.

    Nothing of the size of the arguments is computed: shapes suffice. ``start`` is doubled until it does not fit, then
    the gap is halved.

    Args:
        fn: as for ``plan``.
        make_args: called with ``n``; returns the arguments as a tuple, arrays or ``jax.ShapeDtypeStruct``.
        budget: bytes, as an int or as ``"10GiB"``, for function and gradient.
        overhead: the largest overhead allowed, as a fraction of the plain step's seconds.
        start: the size to begin with; a good guess saves time.
        most: the largest size of interest.
        argnums: as for ``plan``.
        keep: as for ``checkpoint``.
        recompute: as for ``checkpoint``.
        time_limit_seconds: the longest that planning one size may take, recording excluded.

    Raises:
        InfeasibleBudget: not even ``n = 1`` fits.
        ValueError: a budget that is malformed or a share; the memory does not depend on ``n``; as ``plan``.

    Example:
        >>> import jax, jax.numpy as jnp, autoremat.jax
        >>> def loss(w, x):
        ...     return jnp.tanh(jnp.tanh(x @ w) @ w).sum()
        >>> def make_args(n):
        ...     return jax.ShapeDtypeStruct((64, 64), "float32"), jax.ShapeDtypeStruct((n, 64), "float32")
        >>> found = autoremat.jax.max_batch(loss, make_args, budget="200KB", most=1024)
        >>> found.plan.peak_bytes <= 200_000, found.batch > 1
        (True, True)
    """
    _read(budget)
    check_limits(budget, overhead, start, most)
    asked = Asked(budget, Wishes(keep, recompute), time_limit_seconds)
    return largest(
        lambda n: asked.planned(record_step(fn, tuple(make_args(n)), {}, argnums)).plan,
        overhead=overhead, start=start, most=most,
    )  # fmt: skip


def _plan_of(step: Variants, asked: Asked) -> Plan:
    """Plan a step within its budget.

    The floor is the step's, however little time there is to plan.
    """
    return replace(asked.planned(step).plan, floor_bytes=step.floor_bytes(asked))


def _program_of(
    step: Program | Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], argnums: int | Sequence[int]
) -> Program:
    """Return the program, or record that of the function."""
    if not isinstance(step, Program):
        return record_step(step, args, kwargs, argnums).plain.program
    check_alone(bool(args or kwargs), "arguments are for a function")
    return step


def _read(budget: Given) -> Given:
    """Read the budget, if it makes sense here."""
    if Budget.read(budget).is_auto:
        raise ValueError(
            'a budget of "auto" would have to ask the device what is free, and JAX takes its memory ahead of time: '
            'give a size such as "10GiB", or a share of the plain peak such as 0.5'
        )
    return budget
