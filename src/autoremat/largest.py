"""``max_batch``: finds the largest batch that has a plan.

It may as well be the largest sequence length, or image size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from autoremat.api import record_step
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.values import View, storage_of
from autoremat.engines.torch.world.apart import CannotRunApart, RecordingDied, can_be_sent, can_run_apart, run_apart
from autoremat.engines.torch.world.modules import undisturbed
from autoremat.engines.torch.world.problems import UnusableInput
from autoremat.planner import solve
from autoremat.planner.wishes import Patterns, Wishes
from autoremat.program import Plan, Program
from autoremat.show.progress import progress_bar
from autoremat.sizes import MaxBatch, check_limits, largest


def max_batch(
    fn: Callable[..., Any],
    make_inputs: Callable[[int], Any],
    *,
    budget: int | str,
    overhead: float = 0.5,
    start: int = 1,
    most: int = 1 << 24,
    optimizer: Any = None,
    keep: Patterns = (),
    recompute: Patterns = (),
    time_limit_seconds: float = 5.0,
    accumulate: bool = False,
) -> MaxBatch:
    """Find the largest ``n`` whose step has a plan within the budget.

    The step is ``fn(*make_inputs(n))``. Every size is planned on fake tensors, from estimated seconds: nothing of the
    size of the inputs or activations is allocated. ``start`` is doubled until it does not fit, then the gap is halved.
    What ``n`` means is up to ``make_inputs``: the batch, the length of the sequences, the height of the images.

    Args:
        fn: a module or callable, as for ``autoremat.plan``.
        make_inputs: called with ``n`` under ``FakeTensorMode``; returns the arguments of ``fn`` as a tuple, as a
            mapping of keyword arguments, or as one tensor. A slice counts with the whole tensor that it is part of.
        budget: bytes, as an int or as ``"10GiB"``, for the peak of the whole step.
        overhead: the largest overhead allowed, as a fraction of the plain step's seconds.
        start: the size to begin with; a good guess saves time.
        most: the largest size of interest.
        optimizer: as for ``autoremat.plan``.
        keep: as for ``autoremat.plan``.
        recompute: as for ``autoremat.plan``.
        time_limit_seconds: the longest that planning one size may take, recording excluded.
        accumulate: as for ``autoremat.plan``.

    Raises:
        InfeasibleBudget: not even ``n = 1`` fits.
        ValueError: a budget that is malformed or a share, ``make_inputs`` returns no tensor or cannot be run on fake
            tensors, the step cannot be recorded with some ``n``, its memory does not depend on ``n``.

    Example:
        >>> import torch, autoremat
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        >>> found = autoremat.max_batch(model, lambda n: torch.randn(n, 64), budget="10MB", overhead=0.1)
        >>> found.plan.peak_bytes <= 10_000_000, found.plan.overhead <= 0.1, found.batch > 1
        (True, True, True)
    """
    check_limits(budget, overhead, start, most)
    wishes = Wishes(keep, recompute)
    with progress_bar() as progress:

        def plan_of(n: int) -> Plan:
            report = None if progress is None else lambda what, share: progress(f"n = {n}, {what}", share)
            program = _recorded(fn, make_inputs, n, optimizer, accumulate)
            return solve(program, budget, wishes=wishes, time_limit_seconds=time_limit_seconds, progress=report)

        return largest(plan_of, overhead=overhead, start=start, most=most)


def _recorded(
    fn: Callable[..., Any], make_inputs: Callable[[int], Any], n: int, optimizer: Any, accumulate: bool
) -> Program:  # fmt: skip
    """Record the step of size ``n``."""
    args, kwargs = _fake_inputs(make_inputs, n)
    try:
        return record_step(fn, args, kwargs, optimizer, "estimate", accumulate=accumulate)
    except (UnusableInput, RecordingDied):
        raise
    except Exception as error:
        raise ValueError(
            f"the step with n = {n} could not be recorded on fake tensors ({type(error).__name__}: {error}); if n is "
            "too large for the model, name the largest one with most="
        ) from error


def _fake_inputs(make_inputs: Callable[[int], Any], n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make positional and keyword arguments of size ``n``."""
    try:
        inputs = _made(make_inputs, n)
    except RecordingDied:
        raise
    except Exception as error:
        raise ValueError(
            f"make_inputs({n}) failed under FakeTensorMode ({type(error).__name__}: {error}); it should only make "
            "tensors of the right shape and dtype, such as torch.randint(0, 256, (n, 128))"
        ) from error
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        raise ValueError(
            f"make_inputs({n}) returned no tensors but {type(inputs).__name__}; it should return the arguments of the "
            "step as a tuple, as a mapping of keyword arguments, or as one tensor"
        )
    inputs = tree_map(_on_meta, inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _made(make_inputs: Callable[[int], Any], n: int) -> Any:
    """Call ``make_inputs`` on fake tensors, in a child where possible.

    A child is possible if all that it makes can be sent. There the call leaves nothing behind.
    """
    with suppress(CannotRunApart):
        if can_run_apart() and (sent := run_apart(lambda report: _described(_inputs(make_inputs, n)))) is not None:
            memory: dict[int, Tensor] = {}
            with FakeTensorMode(allow_non_fake_inputs=True):
                return tree_map(lambda leaf: leaf.built(memory) if isinstance(leaf, _Described) else leaf, sent)
    with undisturbed((), make_inputs):
        return _inputs(make_inputs, n)


def _inputs(make_inputs: Callable[[int], Any], n: int) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_inputs(n)


@dataclass(frozen=True)
class _Described:
    """A fake tensor without anything that belongs to a process."""

    memory: int
    nbytes: int
    view: View
    device: torch.device
    requires_grad: bool

    def built(self, memory: dict[int, Tensor]) -> Tensor:
        """Make a fake tensor like it; shared memory stays shared."""
        view = self.view
        if self.memory not in memory:
            memory[self.memory] = torch.empty(self.nbytes // view.dtype.itemsize, dtype=view.dtype, device=self.device)
        tensor = memory[self.memory].view(view.dtype).as_strided(view.size, view.stride, view.offset)
        tensor = torch._conj(tensor) if view.conjugated else tensor
        tensor = torch._neg_view(tensor) if view.negated else tensor
        return tensor.detach().requires_grad_(self.requires_grad)


def _described(inputs: Any) -> Any:
    """Replace tensors by descriptions; None if something cannot be sent."""

    def described(tensor: Tensor) -> Any:
        storage = storage_of(tensor)
        if storage is None or not is_leaf(tensor):
            raise TypeError
        return _Described(storage._cdata, storage.nbytes(), View.of(tensor), tensor.device, tensor.requires_grad)

    try:
        sent = tree_map_only(Tensor, described, inputs)
    except TypeError:
        return None
    return sent if can_be_sent(sent) else None


def _on_meta(leaf: Any) -> Any:
    """Turn a fake tensor on meta into an ordinary meta tensor.

    A recording puts such a tensor where the model goes.
    """
    if not isinstance(leaf, FakeTensor) or leaf.device.type != "meta":
        return leaf
    blank = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
    return blank.requires_grad_(leaf.requires_grad)
