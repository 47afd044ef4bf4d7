"""Finds the memory of an optimizer: its state, and its step's temporaries."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoremat.engines.torch.operators.collectives import run_alone
from autoremat.engines.torch.operators.facts import facts_of, tensors_in
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.world.apart import CannotRunApart, can_run_apart, run_apart
from autoremat.engines.torch.world.problems import UnusableInput


class OptimizerBytes(NamedTuple):
    """The memory of an optimizer.

    Attributes:
        state: kept between steps.
        scratch: the most that a step, the first or a later one, takes besides parameters, gradients and state.
    """

    state: int = 0
    scratch: int = 0


def optimizer_bytes(optimizer: Any) -> OptimizerBytes:
    """Return the bytes of an optimizer's state and of its temporaries.

    The state is that of now, and of parameters that have none yet what they get in their first step. Two steps are
    taken by a copy of the optimizer on fake parameters: nothing is allocated or changed.

    Args:
        optimizer: an optimizer, several that take turns, the number of bytes of a state, or None for no state.

    Raises:
        TypeError: none of these.
        UnusableInput: the optimizer cannot take a step on fake parameters.

    Example:
        >>> optimizer_bytes(torch.optim.Adam([torch.nn.Parameter(torch.zeros(100))], fused=True))
        OptimizerBytes(state=804, scratch=0)
    """
    if optimizer is None:
        return OptimizerBytes()
    if isinstance(optimizer, OptimizerBytes):
        return optimizer
    if isinstance(optimizer, int) and not isinstance(optimizer, bool) and optimizer >= 0:
        return OptimizerBytes(optimizer)
    optimizer = _unwrapped(optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _of_one(optimizer)
    if isinstance(optimizer, Sequence) and all(isinstance(o, torch.optim.Optimizer) for o in optimizer):
        found = [_of_one(_unwrapped(o)) for o in optimizer]
        return OptimizerBytes(sum(o.state for o in found), max((o.scratch for o in found), default=0))
    raise TypeError(f"optimizer is a torch optimizer, a list of them or the bytes of their state, got {optimizer!r}")


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer behind the wrappers of Accelerate and Lightning.

    Those pass everything on, and are not optimizers themselves.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _of_one(optimizer: torch.optim.Optimizer) -> OptimizerBytes:
    if any(isinstance(v, torch.optim.Optimizer) for v in vars(optimizer).values()):
        raise UnusableInput(
            f"{type(optimizer).__name__} steps another optimizer, which a step on fake parameters would step, too; say "
            "how many bytes its state takes instead: optimizer=<bytes>"
        )
    try:
        states, scratch = _steps_of(optimizer)
    except Exception as error:
        raise UnusableInput(
            f"{type(optimizer).__name__} cannot take a step on fake parameters ({type(error).__name__}: {error}); say "
            "how many bytes its state takes instead: optimizer=<bytes>"
        ) from error
    coming = sum(made for p, made in zip(_trained(optimizer), states, strict=True) if not optimizer.state.get(p))
    return OptimizerBytes(_state_bytes(optimizer) + coming, scratch)


_KNOWN: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[Any, tuple[list[int], int]]]
_KNOWN = weakref.WeakKeyDictionary()
"""What decides about the steps of an optimizer, and what they take.

Steps are taken in a process of their own, and every step without a plan asks for them.
"""


def _steps_of(optimizer: torch.optim.Optimizer) -> tuple[list[int], int]:
    """Return bytes of state, by parameter, and of temporaries.

    Steps are taken once, and again if parameters or switches change. Numbers, such as a rate that a schedule changes,
    decide about no memory.
    """
    parameters = tuple((p.size(), p.stride(), p.dtype, p.device) for p in map(local_of, _trained(optimizer)))
    groups = [(len(g["params"]), *((k, v) for k, v in g.items() if v is None or isinstance(v, (bool, str))))
              for g in optimizer.param_groups]  # fmt: skip
    about = parameters, tuple(groups)
    known, taken = _KNOWN.get(optimizer, (None, ([], 0)))
    if known != about:
        taken = _apart(optimizer)
        _KNOWN[optimizer] = about, taken
    return taken


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _apart(optimizer: torch.optim.Optimizer) -> tuple[list[int], int]:
    """Take two steps where they leave nothing behind.

    An optimizer may change its own attributes, for one.
    """
    with contextlib.suppress(CannotRunApart):
        if can_run_apart():
            return run_apart(lambda report: _two_steps(optimizer))
    return _two_steps(optimizer)


def _two_steps(optimizer: torch.optim.Optimizer) -> tuple[list[int], int]:
    """Return bytes of state, by parameter, and of temporaries of two steps.

    The first step makes the state as it goes; later ones find it.
    """
    mode = FakeTensorMode()
    twin = _twin(optimizer, mode)
    step = type(optimizer).step
    # torch wraps ``step`` in a function that runs the user's hooks (``profile_hook_step`` in torch/optim/optimizer.py,
    # 2.13): go past it.
    take = getattr(step, "__wrapped__", step)
    peaks = []
    for _ in range(2):
        with mode, _Account() as account:
            take(twin)
        peaks.append(account.peak_bytes)
    states = [_bytes_of([twin.state.get(p, {})]) for p in _trained(twin)]
    return states, max(peaks[0] - _state_bytes(twin), peaks[1])


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return _bytes_of(optimizer.state.values())


def _bytes_of(states: Iterable[Mapping[str, Any]]) -> int:
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for state in states
        for t in map(local_of, torch.utils._pytree.tree_leaves(dict(state)))
        if isinstance(t, Tensor)
    }
    return sum(storages.values())


def _twin(optimizer: torch.optim.Optimizer, mode: FakeTensorMode) -> torch.optim.Optimizer:
    """Copy an optimizer without its state, on parameters without memory."""
    groups = []
    for group in optimizer.param_groups:
        parameters = [_fake_parameter(local_of(p), mode) for p in group["params"] if p.requires_grad]
        groups.append({k: v for k, v in group.items() if k != "params"} | {"params": parameters})
    twin = copy.copy(optimizer)
    twin.__dict__ = dict(optimizer.__dict__)
    twin.param_groups = groups
    twin.state = type(optimizer.state)(dict)
    return twin


def _fake_parameter(parameter: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        fake = torch.nn.Parameter(torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype,
                                                      device=parameter.device))  # fmt: skip
        fake.grad = torch.empty_like(fake)
    return fake


class _Account(TorchDispatchMode):
    """Counts the bytes of living storages made in this mode.

    It also keeps their peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.5  # no size depends on it
        if facts_of(func).communicates:
            return run_alone(func, args, kwargs or {})
        before = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._living:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, nbytes = storage._cdata, storage.nbytes()

        def release(_: object) -> None:
            del self._living[address]
            self.bytes -= nbytes

        self._living[address] = weakref.ref(storage, release)
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
