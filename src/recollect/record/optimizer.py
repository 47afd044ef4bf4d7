"""Bytes that an optimizer keeps between steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def optimizer_state_bytes(optimizer: Any) -> int:
    """The size of an optimizer's state: as it is, or as it will be after its first step.

    The first step is taken by a copy of the optimizer on fake parameters: nothing is allocated or changed.

    Args:
        optimizer: an optimizer, a number of bytes, or None for no state.

    Raises:
        TypeError: neither of these.
    """
    if optimizer is None:
        return 0
    if isinstance(optimizer, int) and not isinstance(optimizer, bool) and optimizer >= 0:
        return optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer is a torch optimizer or the bytes of its state, got {optimizer!r}")
    return _state_bytes(optimizer) or _state_bytes(_after_first_step(optimizer))


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in torch.utils._pytree.tree_leaves(dict(state))
        if isinstance(t, Tensor)
    }
    return sum(storages.values())


def _after_first_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    mode = FakeTensorMode()
    groups = []
    for group in optimizer.param_groups:
        parameters = [_fake_parameter(p, mode) for p in group["params"] if p.requires_grad]
        groups.append({k: v for k, v in group.items() if k != "params"} | {"params": parameters})
    twin = copy.copy(optimizer)
    twin.__dict__ = dict(optimizer.__dict__)
    twin.param_groups = groups
    twin.state = type(optimizer.state)(dict)
    with mode:
        step = type(optimizer).step
        getattr(step, "__wrapped__", step)(twin)  # past the profiling wrapper, which knows the real optimizer only
    return twin


def _fake_parameter(parameter: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        fake = torch.nn.Parameter(torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype,
                                                      device=parameter.device))  # fmt: skip
        fake.grad = torch.empty_like(fake)
    return fake
