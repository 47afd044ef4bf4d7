"""``check``: compares a plain step with a checkpointed one.

Everything that the two leave behind is compared.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from autoremat.checkpointed import session_of
from autoremat.engines.torch.eager.check import Differs
from autoremat.engines.torch.eager.options import Options
from autoremat.engines.torch.eager.session import Session
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.settings import RandomStates
from autoremat.engines.torch.recording.recorder import backward_from
from autoremat.engines.torch.world.apart import CannotRunApart, can_run_apart, run_apart
from autoremat.engines.torch.world.devices import is_unreal
from autoremat.engines.torch.world.memory_account import measured_peak
from autoremat.engines.torch.world.modules import (
    gradients_kept,
    leaves_of,
    map_tensors,
    named_tensors,
    reachable_modules,
    undisturbed,
)
from autoremat.engines.torch.world.outputs import differentiable_outputs
from autoremat.engines.torch.world.problems import NOTHING, NothingDifferentiable, UnusableInput
from autoremat.planner.wishes import Patterns
from autoremat.program import Plan
from autoremat.show.progress import progress_bar


@dataclass(frozen=True)
class Difference:
    """A tensor or generator that is not bit-identical.

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
        kept: operators found to give something else when they are rerun, with module, line and reason.
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
        """Write a table that a person can read."""
        from autoremat.show.check_lines import check_text

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
    """Compare checkpointed steps with plain ones, bit by bit.

    Two steps are run plainly and two checkpointed, and what they leave behind is compared. All start from the same
    parameters, buffers and generator states and from no gradients. Of the checkpointed steps the first is recorded and
    planned, the second follows the plan, both with the self-check. Afterwards everything is as before; hooks on leaves,
    which may step an optimizer, do not run. The backward starts from the loss, or from the sum of everything returned
    that requires grad, and ends at the arguments. This takes the memory of a plain step, and that of the parameters and
    buffers once more. Where a process may be forked, each pair of steps runs in a child with one thread, and leaves
    nothing behind.

    Args:
        target: a module or callable, checkpointed by autoremat already or not.
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
        ValueError: no budget for what is not checkpointed, or one for what is; parameters that are not there yet;
            otherwise as ``checkpoint``.
        InfeasibleBudget: no plan fits.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> autoremat.check(model, torch.randn(512, 64), budget=0.9).is_exact
        True
    """
    known = session_of(target)
    if (budget is None) == (known is None):
        raise ValueError(
            "give a budget: this is not checkpointed by autoremat"
            if known is None
            else "leave the budget out: this is checkpointed by autoremat and has its own"
        )
    plain = target if known is None else known.fn
    modules = reachable_modules(plain, args, kwargs)
    _refuse_unreal(modules, args, kwargs)
    options = Options(budget or 1.0, optimizer, keep, recompute, time_limit_seconds, shown=progress_bar)
    session = Session(plain, options if known is None else known.planner)
    args, kwargs = map_tensors((args, kwargs), _without_history)
    with torch.enable_grad(), _all_as_before(_named(modules, args, kwargs).values()) as start_anew:
        start_anew()
        reference = _apart(lambda: [_run(plain, session, modules, args, kwargs, start_anew) for _ in range(_STEPS)])
        return _apart(lambda: _compared(reference, session, modules, args, kwargs, start_anew))


_STEPS: Final = 2
"""How many steps of each sort are run.

The first checkpointed one is recorded, the second follows the plan. The plain ones are as many, so that whatever the
callable counts is the same in both.
"""
_Seen = tuple[dict[str, Tensor], int]
"""What a step leaves behind, by name, and its measured peak."""


def _apart(work: Callable[[], Any]) -> Any:
    """Do the work in a child, where possible, else here.

    After a child, the next one finds everything as this one has.
    """
    with contextlib.suppress(CannotRunApart, pickle.PicklingError):
        if can_run_apart():
            return run_apart(lambda report: work())
    return work()


def _run(
    call: Callable[..., Any], session: Session, modules: Sequence[nn.Module], args: Sequence[Any],
    kwargs: dict[str, Any], start_anew: Callable[[], None],
) -> _Seen:  # fmt: skip
    """Run one step from the initial state."""
    while True:
        start_anew()
        with (
            contextlib.suppress(Differs),
            undisturbed(modules, session.fn, args, kwargs),
        ):  # the self-check finds one operator at a time, which is kept in the next attempt
            return _observed(lambda: call(*args, **kwargs), modules, _named(modules, args, kwargs))


def _compared(
    reference: Sequence[_Seen], session: Session, modules: Sequence[nn.Module], args: Sequence[Any],
    kwargs: dict[str, Any], start_anew: Callable[[], None],
) -> Check:  # fmt: skip
    """Compare planned steps with the plain ones that came before."""
    expected, plain_peak = reference[0]
    steps = [_run(lambda *a, **k: session.call(a, k), session, modules, args, kwargs, start_anew) for _ in reference]
    stats = session.stats()
    values = stats.plan.program.values if stats.plan is not None else ()
    beside = sum(v.nbytes for v in values if v.kind == "optimizer")
    wrong = {
        n: _distance(a, seen[n])
        for (plain, _), (seen, _) in zip(reference, steps, strict=True)
        for n, a in plain.items()
        if not _is_same(a, seen[n])
    }
    return Check(
        stats.plan,
        {kind: sum(name.startswith(kind) for name in expected) for kind in _KINDS},
        tuple(Difference(n, wrong[n]) for n in expected if n in wrong),
        plain_peak + beside,
        max(peak for _, peak in steps) + beside,
        session.kept(),
        stats.deviations,
    )


def _refuse_unreal(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> None:
    if is_unreal(modules, args, kwargs):
        raise UnusableInput("a check runs the step, and these tensors are fake or on meta: give it real ones")
    if any(nn.parameter.is_lazy(t) for _, _, t in named_tensors(modules)):
        raise UnusableInput("a check compares parameters, and some are not there yet: run the lazy modules once before")


_KINDS = ("output", "gradient", "buffer", "generator")


def _without_history(tensor: Tensor) -> Tensor:
    """Detach an argument, so that the backward ends there.

    The graph behind it is for the user's own backward.
    """
    return tensor.detach().requires_grad_() if tensor.requires_grad and not is_leaf(tensor) else tensor


def _named(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Give parameters, buffers and tensor arguments names of their own."""
    found: dict[str, Tensor] = {}
    inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    pairs = [(name, t) for name, _, t in named_tensors(modules)]
    for name, tensor in [*pairs, *((f"input {i}", t) for i, t in enumerate(inputs))]:
        _add(found, name, tensor)
    return found


def _add(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Add a tensor under its name, with a number where taken.

    Two modules that a function uses may have tensors of the same name.
    """
    names = [name, *(f"{name} ({i})" for i in range(2, len(found) + 2))]
    found[next(n for n in names if n not in found)] = tensor


@contextmanager
def _all_as_before(tensors: Iterable[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield a function that restores numbers and generators, and drops gradients.

    At the end of the block everything is restored, gradients too.
    """
    saved = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]
    gradients = [(t, t.grad) for t, _ in saved if is_leaf(t)]
    states = RandomStates.now()

    def start_anew() -> None:
        with torch.no_grad():
            for tensor, numbers in saved:
                if not _is_same(tensor, numbers):
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


def _observed(forward: Callable[[], Any], modules: Sequence[nn.Module], tensors: Mapping[str, Tensor]) -> _Seen:
    """Run a step and return what it leaves behind."""
    seen: dict[str, Tensor] = {}
    names = {id(t): name for name, t in tensors.items()}
    first_node = torch.ones(1, requires_grad=True).clone().grad_fn

    def step() -> None:
        outputs = differentiable_outputs(forward())
        if not outputs:
            raise NothingDifferentiable(NOTHING)
        leaves = leaves_of(outputs, since=first_node)
        seen.update({f"output {i}": t.detach() for i, t in enumerate(outputs)})  # held, as in the recording
        begin = backward_from(outputs)
        with gradients_kept(leaves):
            for leaf in leaves:
                leaf.grad = None
            begin()
            gradients = [(names.get(id(t), "a tensor of the function"), t.grad) for t in leaves]
        for name, gradient in gradients:
            if gradient is not None:
                _add(seen, f"gradient of {name}", gradient)

    peak = measured_peak(step, *tensors.values())
    for name, kind, t in named_tensors(modules):
        if kind == "buffer":
            _add(seen, f"buffer {name}", t)
    seen |= {f"generator of {g.device}": torch.tensor(state) for g, state in RandomStates.now().torch}
    return {name: t.detach().clone() for name, t in seen.items()}, peak


def _is_same(a: Tensor, b: Tensor | None) -> bool:
    if b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = ((t if t.layout is torch.strided else t.to_dense()).resolve_conj().resolve_neg() for t in (a, b))
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _distance(a: Tensor, b: Tensor | None) -> float:
    if b is None or a.shape != b.shape or not a.numel():
        return float("nan")
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float((a.to(wide) - b.to(wide)).abs().max())
