"""The fake tensors of a shadow: their mode and their recorder.

It has what can be asked of such tensors, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._python_dispatch import _disable_current_modes

from autoremat.engines.torch.eager.facts import unseen
from autoremat.engines.torch.eager.told import Told
from autoremat.engines.torch.operators.local import Description, Jagged, has_inside, is_distributed, is_jagged, local_of
from autoremat.engines.torch.operators.values import storage_of

_SMALL: Final = 4096
"""At most this many numbers are taken to decide about sizes."""

Blank = Callable[[], Tensor]
"""Makes another fake tensor of some kind."""


class Unlike(Exception):
    """A call differs on fake tensors; the step cannot be recorded."""


class TwinWorld:
    """Where twins live: the mode of fake tensors, and what records them.

    Args:
        module_path: the path of the module that runs now.
    """

    def __init__(self, module_path: Callable[[], str]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = Told(blank, self.as_fake, module_path)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Work among fake tensors, unseen by function modes, recording nothing."""
        with unseen(), self.mode, warnings.catch_warnings(), self.recorder.paused():
            warnings.simplefilter("ignore")
            yield

    def as_fake(self, tensor: Tensor) -> Tensor:
        """Turn a tensor into a fake one, or the one beside it."""
        if (twin := twin_beside(tensor)) is not None:
            return twin
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)


def without_duals() -> AbstractContextManager[Any]:
    """Disable forward-mode derivatives, which stand-in nodes do not have."""
    return _set_fwd_grad_enabled(False)


def blank_of(tensor: Tensor) -> Blank:
    """Return what makes such a fake tensor, without holding this one."""
    if is_jagged(tensor):
        inside, values = Jagged.of(tensor), blank_of(local_of(tensor))
        return lambda: inside.around(values())
    if is_distributed(tensor):
        around, local = Description.of(tensor), blank_of(local_of(tensor))
        return lambda: around.around(local())
    return partial(torch.empty, tensor.size(), dtype=tensor.dtype, device=tensor.device)


def with_twin(numbers: Tensor, twin: Tensor) -> Tensor:
    """Copy real numbers that stand for a fake tensor.

    The copy keeps the fake tensor alive.
    """
    with _disable_current_modes():
        made = numbers.clone()
    made.twin_beside = twin  # type: ignore[attr-defined]
    return made


def twin_beside(tensor: Tensor) -> Tensor | None:
    """Return the fake tensor that a real one stands for, if any."""
    return getattr(tensor, "twin_beside", None)


def blank(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make an empty tensor."""
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def count_of(tensor: Tensor) -> int:
    """Count a mask's nonzero elements; the size of anything else."""
    if tensor.dtype is not torch.bool or is_opaque(tensor) or has_inside(tensor):
        return tensor.numel()
    with unseen():
        return int(tensor.count_nonzero())


def is_small_index(tensor: Tensor) -> bool:
    """Tell whether numbers decide about sizes, as lengths of sequences do."""
    integer = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return integer and tensor.device.type == "cpu" and tensor.numel() <= _SMALL and not is_opaque(tensor)


def is_opaque(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory cannot be seen.

    Sparse, quantized, nested and wrapped tensors are examples.
    """
    return storage_of(local_of(tensor)) is None and not has_inside(tensor)


def is_nested(tensor: Tensor) -> bool:
    """Tell whether this is a nested tensor of the strided layout.

    A plain one with as many elements stands for it.
    """
    return tensor.is_nested and not is_jagged(tensor)


def is_like(twin: Tensor, tensor: Tensor) -> bool:
    """Tell whether two tensors differ in nothing but their numbers."""
    if is_jagged(tensor):
        return is_jagged(twin) and is_like(local_of(twin), local_of(tensor))
    if is_nested(tensor):
        return twin.numel() == tensor.numel()
    if twin.size() != tensor.size() or twin.dtype is not tensor.dtype or twin.layout is not tensor.layout:
        return False
    if tensor.layout is not torch.strided or is_distributed(tensor):
        return True
    if twin.storage_offset() != tensor.storage_offset():
        return False
    return twin.stride() == tensor.stride() or _steps(twin) == _steps(tensor)


def _steps(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides that say where an element is.

    In others, real kernels and fake ones differ.
    """
    if not tensor.numel():
        return ()
    return tuple([step for n, step in zip(tensor.size(), tensor.stride(), strict=True) if n > 1])
