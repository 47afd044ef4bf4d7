"""``check``: one plain step and one checkpointed step, side by side, and everything that they leave behind compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recollect.api import Options, session_of
from recollect.plan.constraints import Patterns
from recollect.program import Plan
from recollect.record.record import UnusableInput, differentiable_outputs, is_unreal
from recollect.record.world import named_tensors, reachable_modules, undisturbed
from recollect.run.account import measured_peak
from recollect.run.session import Session
from recollect.run.settings import RandomStates


@dataclass(frozen=True)
class Difference:
    """A tensor or generator that is not the same to the last bit.

    Attributes:
        name: such as ``gradient of blocks.0.weight``.
        largest: the largest difference between two elements; NaN where the two cannot be subtracted.
    """

    name: str
    largest: float


@dataclass(frozen=True)
class Check:
    """A plain step beside a checkpointed one.

    Attributes:
        plan: that the checkpointed step followed; None where none could be made.
        compared: how many there were to compare, by what they are: outputs, gradients, buffers, generators.
        differences: what was not bit-identical.
        plain_peak_bytes: of the plain step, by the allocator's own account.
        peak_bytes: of the checkpointed step, by the same account.
        kept: operators found to give something else when they run again, with module, line and reason.
        deviations: how often the step left its recorded path.
    """

    plan: Plan | None
    compared: Mapping[str, int]
    differences: tuple[Difference, ...]
    plain_peak_bytes: int
    peak_bytes: int
    kept: tuple[str, ...]
    deviations: int

    @property
    def is_exact(self) -> bool:
        """Whether everything was the same to the last bit."""
        return not self.differences

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak was within the budget."""
        return self.plan is not None and self.peak_bytes <= self.plan.budget_bytes

    def __str__(self) -> str:
        """A table that a person can read."""
        from recollect.show.check_text import check_text

        return check_text(self)


def check(
    target: Callable[..., Any],
    *args: Any,
    budget: int | float | str | None = None,
    optimizer: Any = None,
    keep: Patterns = (),
    recompute: Patterns = (),
    time_limit_seconds: float = 10.0,
    **kwargs: Any,
) -> Check:
    """Run one step plainly and one checkpointed, and compare what they leave behind, bit by bit.

    Both start from the same parameters, buffers and generator states and from no gradients; the checkpointed one runs
    with the self-check of a first step. Afterwards everything is as before. The backward starts from the loss, or from
    the sum of everything returned that requires grad. Takes the memory of a plain step, and that of the parameters and
    buffers once more.

    Args:
        target: a module or callable, checkpointed by recollect already or not.
        *args: its positional arguments.
        budget: as for ``checkpoint``; left out for what is checkpointed already, which has its own.
        optimizer: as for ``checkpoint``.
        keep: as for ``checkpoint``.
        recompute: as for ``checkpoint``.
        time_limit_seconds: as for ``checkpoint``.
        **kwargs: keyword arguments of the target.

    Returns:
        ``is_exact``, ``is_within_budget``, the differences by name; ``str()`` is a table.

    Raises:
        ValueError: no budget for what is not checkpointed, or one for what is; otherwise as ``checkpoint``.
        InfeasibleBudget: no plan fits.

    Example:
        >>> import torch, recollect
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> recollect.check(model, torch.randn(512, 64), budget=0.9).is_exact
        True
    """
    known = session_of(target)
    if (budget is None) == (known is None):
        raise ValueError(
            "give a budget: this is not checkpointed by recollect"
            if known is None
            else "leave the budget out: this is checkpointed by recollect and has its own"
        )
    plain = target if known is None else known.fn
    _refuse_unreal(plain, args, kwargs)
    options = Options(budget or 1.0, optimizer, keep, recompute, time_limit_seconds)
    session = Session(plain, options if known is None else known.planner)
    modules = reachable_modules(plain, args, kwargs)
    leaves = _leaves(modules, args, kwargs)
    inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    with _all_as_before(modules, inputs, leaves) as start_anew:
        start_anew()
        session.prepare(args, kwargs)
        calls = lambda: plain(*args, **kwargs), lambda: session.call(args, kwargs)
        runs = []
        for call in calls:
            start_anew()
            with undisturbed(modules, plain, args, kwargs):
                runs.append(_observed(call, modules, inputs, leaves))
    (reference, plain_peak), (seen, peak) = runs
    stats = session.stats()
    values = stats.plan.program.values if stats.plan is not None else ()
    beside = sum(v.nbytes for v in values if v.kind == "optimizer")
    return Check(
        stats.plan,
        {kind: sum(name.startswith(kind) for name in reference) for kind in _KINDS},
        tuple(Difference(n, _distance(a, seen[n])) for n, a in reference.items() if not _is_same(a, seen[n])),
        plain_peak + beside,
        peak + beside,
        session.kept(),
        stats.deviations,
    )


def _refuse_unreal(fn: Any, args: Any, kwargs: Any) -> None:
    if is_unreal(reachable_modules(fn, args, kwargs), args, kwargs):
        raise UnusableInput("a check runs the step, and these tensors are fake or on meta: give it real ones")


_KINDS = ("output", "gradient", "buffer", "generator")


def _leaves(modules: Sequence[Any], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Everything that may get a gradient, by name."""
    found = {name: t for name, kind, t in named_tensors(modules) if kind == "parameter"}
    inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    found |= {f"input {i}": t for i, t in enumerate(inputs) if t.is_leaf}
    return {name: t for name, t in found.items() if t.requires_grad}


@contextmanager
def _all_as_before(
    modules: Sequence[Any], inputs: Sequence[Tensor], leaves: Mapping[str, Tensor]
) -> Iterator[Callable[[], None]]:
    """Yields a function that puts numbers and generators back to the start, without gradients."""
    tensors = [*(t for _, _, t in named_tensors(modules)), *inputs]
    saved = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]
    gradients = [(t, t.grad) for t in leaves.values()]
    states = RandomStates.now()

    def start_anew() -> None:
        with torch.no_grad():
            for tensor, numbers in saved:
                if not torch.equal(tensor, numbers):
                    tensor.copy_(numbers)
        for tensor, _ in gradients:
            tensor.grad = None
        states.restore()

    try:
        yield start_anew
    finally:
        start_anew()
        for tensor, gradient in gradients:
            tensor.grad = gradient


def _observed(
    forward: Callable[[], Any], modules: Sequence[Any], inputs: Sequence[Tensor], leaves: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """What a step leaves behind, by name, and its peak by the allocator's account."""
    seen: dict[str, Tensor] = {}

    def step() -> None:
        result = forward()
        outputs = differentiable_outputs(result)
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        seen.update({f"output {i}": t.detach() for i, t in enumerate(outputs)})

    peak = measured_peak(step, *(t for _, _, t in named_tensors(modules)), *inputs)
    seen |= {f"gradient of {name}": t.grad for name, t in leaves.items() if t.grad is not None}
    seen |= {f"buffer {name}": t.clone() for name, kind, t in named_tensors(modules) if kind == "buffer"}
    seen |= {f"generator of {g.device}": torch.tensor(state) for g, state in RandomStates.now().torch}
    return {name: t.detach().clone() for name, t in seen.items()}, peak


def _is_same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.coalesce().to_dense() if t.layout is torch.sparse_coo else t for t in (a, b))
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _distance(a: Tensor, b: Tensor | None) -> float:
    if b is None or a.shape != b.shape or not a.numel():
        return float("nan")
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float((a.to(wide) - b.to(wide)).abs().max())
