"""Fits a train step into a budget by XLA's own account: compile, read, tighten, and keep the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import jax

from autoremat.engines.jax.compiler import Memory, compiler_options, flops, memory
from autoremat.engines.jax.planning import Allowance, allowed
from autoremat.program import InfeasibleBudget, Plan
from autoremat.program.units import format_bytes

_LEAST_STEP: Final = 0.01
"""Of what checkpointed functions take in plain training: by less a further try is not tightened."""
_OVERSHOOT: Final = 1.1
"""How much more is taken away than is missing, because XLA does not follow to the byte."""
_GROWTH: Final = 4.0
"""How much larger a further step is than the one before, which was too small: XLA may not follow at all for a while."""
_LOOSE: Final = 0.9
"""A step that takes less than this share of the budget is tried once more with more room."""


@dataclass(frozen=True)
class Try:
    """One step that was compiled.

    Attributes:
        share: what its checkpointed functions were allowed, of what they take in plain training.
        plans: of its checkpointed functions.
        memory: by XLA's account.
        flops: by XLA's count, which counts the body of a loop once.
        fits: whether it is within the budget.
        is_at_the_floor: whether no smaller plan is known.
    """

    share: float
    plans: tuple[Plan, ...]
    memory: Memory
    flops: float
    fits: bool
    is_at_the_floor: bool

    @property
    def extra_seconds(self) -> float:
        """Estimated seconds of what is computed again."""
        return sum(p.overhead * p.program.seconds for p in self.plans)

    @property
    def overhead(self) -> float:
        """The same as a share of what the checkpointed functions take."""
        return self.extra_seconds / (sum(p.program.seconds for p in self.plans) or 1.0)


@dataclass(frozen=True)
class Fitted:
    """A compiled train step within its budget. It is called like the step, without its static arguments.

    Attributes:
        compiled: as ``jax.jit(step).lower(...).compile()`` returns it.
        budget_bytes: what it is within.
        chosen: the try that it is.
        tries: every step that was compiled, in that order; the first one is plain training.
    """

    compiled: Any
    budget_bytes: int
    chosen: Try
    tries: tuple[Try, ...]

    def __call__(self, *args: Any) -> Any:
        """Run the step."""
        return self.compiled(*args)

    @property
    def memory(self) -> Memory:
        """Its memory, by XLA's account."""
        return self.chosen.memory

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of its checkpointed functions."""
        return self.chosen.plans

    def __str__(self) -> str:
        """Every try, and which one it is."""
        return "\n".join([f"Fitted into {format_bytes(self.budget_bytes)}", *_lines(self.tries, self.chosen)])


def _lines(tries: Sequence[Try], chosen: Try | None) -> list[str]:
    base = tries[0].flops or 1.0
    return [
        f"  {k:>2}  allowed {t.share:>6.1%}  total {format_bytes(t.memory.total_bytes):>9}  "
        f"FLOPs x {t.flops / base:.3f}  extra time {t.overhead:+.1%}"
        + "".join(f"  {word}" for word in _words(k, t, chosen))
        for k, t in enumerate(tries)
    ]


def _words(k: int, tried: Try, chosen: Try | None) -> list[str]:
    words = {"plain": not k, "above the budget": not tried.fits, "chosen": tried is chosen}
    return [word for word, is_so in words.items() if is_so]


def fitted(
    step: Callable[..., Any], args: Sequence[Any], budget_bytes: int, jit_options: Mapping[str, Any],
    options: Mapping[str, Any], most_tries: int,
) -> Fitted:  # fmt: skip
    """Compile a step until it is within its budget.

    Raises:
        InfeasibleBudget: it is not, whatever is computed again; names the smallest total that was measured.
        ValueError: nothing in the step is checkpointed.
    """
    search = _Search(_Builder(step, args, jit_options, compiler_options(options)), budget_bytes)
    search.first()
    for left in reversed(range(most_tries)):
        share = search.next_share()
        if share is None:
            break
        search.build(share if left or search.best else 0.0)
    if search.best is None:
        raise _infeasible(search.tries, budget_bytes)
    compiled, chosen = search.best
    return Fitted(compiled, budget_bytes, chosen, tuple(search.tries))


class _Builder:
    """Traces and compiles one step again and again."""

    def __init__(
        self, step: Callable[..., Any], args: Sequence[Any], jit_options: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        is_jitted = hasattr(step, "lower") and not jit_options  # by jax.jit, with options of its own
        self._step: Any = step if is_jitted else jax.jit(step, **jit_options)
        self._args = args
        self._options = dict(options) or None

    def build(self, share: float) -> tuple[Any, Allowance]:
        """A compiled step, and what was planned for it."""
        allowance = Allowance(share)
        with allowed(allowance):
            lowered = self._step.lower(*self._args)
        return lowered.compile(compiler_options=self._options), allowance


class _Search:
    """What has been tried, and what to try next."""

    def __init__(self, builder: _Builder, budget_bytes: int) -> None:
        self._builder, self._budget_bytes = builder, budget_bytes
        self.tries: list[Try] = []
        self.best: tuple[Any, Try] | None = None
        self._movable_bytes = 0

    def first(self) -> None:
        """Plain training."""
        self.build(1.0)
        plans = self.tries[0].plans
        if not plans:
            raise ValueError(
                "nothing in this step is checkpointed, so that there is nothing to tighten: wrap its loss in "
                "autoremat.jax.checkpoint(loss), without a budget, and differentiate that"
            )
        self._movable_bytes = sum(p.plain_peak_bytes - p.program.fixed_bytes for p in plans)

    def build(self, share: float) -> None:
        """Compile a step with that share, and remember the best that fits."""
        compiled, allowance = self._builder.build(share)
        found = memory(compiled)
        fits = found.total_bytes <= self._budget_bytes
        tried = Try(share, tuple(allowance.plans), found, flops(compiled), fits, allowance.is_at_the_floor)
        self.tries.append(tried)
        if fits and (self.best is None or tried.extra_seconds < self.best[1].extra_seconds):
            self.best = compiled, tried

    def next_share(self) -> float | None:
        """What to allow next; None where nothing is to be gained."""
        last = self.tries[-1]
        over = (last.memory.total_bytes - self._budget_bytes) / (self._movable_bytes or 1)
        if not last.fits:
            return None if last.is_at_the_floor else self._tighter(last, over)
        if last.share >= 1 or self._is_loosened or last.memory.total_bytes >= _LOOSE * self._budget_bytes:
            return None
        too_much = min(t.share for t in self.tries if not t.fits)
        return min(last.share - 0.8 * over, (last.share + too_much) / 2)

    @property
    def _is_loosened(self) -> bool:
        """Whether one try has had more room than the one before."""
        return any(b.share > a.share for a, b in pairwise(self.tries))

    def _tighter(self, last: Try, over: float) -> float | None:
        if self.best is not None:  # the one with more room did not fit
            return None
        planned = sum(p.peak_bytes - p.program.fixed_bytes for p in last.plans) / (self._movable_bytes or 1)
        if len(self.tries) == 1:
            return max(0.0, min(last.share, planned) - over)
        before = 0.0 if len(self.tries) == 2 else self.tries[-2].share - last.share
        return max(0.0, min(last.share, planned) - max(_OVERSHOOT * over, _GROWTH * before, _LEAST_STEP))


def _infeasible(tries: Sequence[Try], budget_bytes: int) -> InfeasibleBudget:
    least = min(tries, key=lambda t: t.memory.total_bytes)
    found = least.memory
    return InfeasibleBudget(
        f"no step that was compiled is within {format_bytes(budget_bytes)}; the smallest takes "
        f"{format_bytes(found.total_bytes)} by XLA's account ({format_bytes(found.arguments_bytes)} arguments, "
        f"{format_bytes(found.outputs_bytes - found.aliased_bytes)} outputs beside donated ones, "
        f"{format_bytes(found.temporaries_bytes)} temporaries). Give a larger budget, a smaller batch, or donate the "
        "state that the step replaces (donate_argnums).\n" + "\n".join(_lines(tries, None)),
        budget_bytes=budget_bytes,
        floor_bytes=found.total_bytes,
    )
