"""Replaces a step's tensors by fake tensors while the step is recorded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import Jagged, distributed_like, is_distributed, is_jagged, local_of
from autoremat.engines.torch.recording.living import Living
from autoremat.engines.torch.world.modules import map_tensors, named_tensors, swap_tensors, without_caches
from autoremat.engines.torch.world.parallel import Parallel, whole_parameter


@dataclass(frozen=True)
class FakeWorld:
    """Fake arguments, and the function that makes other tensors fake."""

    args: Any
    kwargs: Any
    convert: Callable[[Tensor], Tensor]


_FAKE_TENSOR_LOG = logging.getLogger(FakeTensorMode.__module__)
"""The log in which torch writes tracebacks of failures on fake tensors."""


@contextmanager
def fake_world(
    modules: Sequence[nn.Module], args: Any, kwargs: Any, device: torch.device | str | None, parallel: Parallel,
    living: Living,
) -> Iterator[FakeWorld]:  # fmt: skip
    """Give modules and arguments fake tensors for the length of the block."""
    mode = _fake_mode_in(modules, args, kwargs) or FakeTensorMode(allow_non_fake_inputs=True)
    # By default ``data_ptr()`` of a fake tensor is 0 (``torch/_subclasses/fake_tensor.py``, 2.13), and compiled code
    # would use this address. So let it raise.
    mode._allow_unsafe_data_ptr_access = False
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    converted: dict[int, Tensor] = {}
    originals: list[Tensor] = []  # an id stays taken while its tensor lives

    def convert(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in converted:
            originals.append(tensor)
            if is_jagged(tensor):
                inside = Jagged.of(tensor).converted(convert)
                values = convert(local_of(tensor).detach())
                converted[id(tensor)] = inside.around(values).requires_grad_(tensor.requires_grad)
                return converted[id(tensor)]
            if is_distributed(tensor):
                converted[id(tensor)] = distributed_like(tensor, convert(local_of(tensor).detach()))
                return converted[id(tensor)]
            with torch.utils._python_dispatch._disable_current_modes():
                fake = mode.from_tensor(tensor)
                converted[id(tensor)] = _placed(fake, mode, target) if tensor.device.type == "meta" else fake
                living.note([fake, converted[id(tensor)]])
        return converted[id(tensor)]

    def convert_argument(tensor: Tensor) -> Tensor:
        """Convert an argument, into a leaf if it has a history.

        The graph that the argument comes from is no part of the callable.
        """
        if is_leaf(tensor) or isinstance(tensor, FakeTensor) or id(tensor) in converted:
            return convert(tensor)
        originals.append(tensor)
        converted[id(tensor)] = convert(tensor.detach()).requires_grad_(tensor.requires_grad)
        return converted[id(tensor)]

    with warnings.catch_warnings(), _quiet(_FAKE_TENSOR_LOG), without_caches():
        warnings.simplefilter("ignore")
        with mode:
            _make_whole(parallel)
        swap_tensors(modules, convert)
        fake_args, fake_kwargs = map_tensors((tuple(args), kwargs), convert_argument)
        with mode:
            yield FakeWorld(fake_args, fake_kwargs, convert)


@contextmanager
def _quiet(log: logging.Logger) -> Iterator[None]:
    """Silence a logger: what fails on fakes is recorded on real tensors."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _make_whole(parallel: Parallel) -> None:
    """Give modules fake parameters of full size in place of their shards."""
    made: dict[int, Tensor] = {}
    for unit in parallel.units:
        for module, name, parameter in unit.parameters():
            if id(parameter) not in made:
                made[id(parameter)] = whole_parameter(unit, parameter)
            module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]


def _placed(fake: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """Move a fake tensor from the meta device to another device."""
    with mode, torch.no_grad():
        moved = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=device)
    if isinstance(fake, nn.Parameter):
        moved = nn.Parameter(moved, requires_grad=fake.requires_grad)
    moved.requires_grad_(fake.requires_grad)
    if fake.is_leaf and fake.grad is not None:
        moved.grad = _placed(fake.grad, mode, device)
    return moved


def _fake_mode_in(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> FakeTensorMode | None:
    tensors = [t for _, _, t in named_tensors(modules)]
    tensors += torch.utils._pytree.tree_leaves((args, kwargs))
    return next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
