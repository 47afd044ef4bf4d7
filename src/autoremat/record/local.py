"""DTensors: what is in memory of one is its local tensor, and operators on it run operators on that.

So recorder and tape let a DTensor take its operators apart, see those on local tensors and the collectives between
them, and treat a saved DTensor as its local tensor with a description.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _class(module: str, name: str) -> Any:
    """A class, if its module is loaded already: without it there are no objects of it."""
    return getattr(sys.modules.get(module), name, None)


def is_distributed(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    kind = _class("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def is_taken_apart(types: Collection[type]) -> bool:
    """Whether an operator on tensors of these classes runs others, on the tensors inside them."""
    known = (
        _class("torch.distributed.tensor", "DTensor"),
        _class("torch.distributed._functional_collectives", "AsyncCollectiveTensor"),
    )
    return any(k is not None and issubclass(t, k) for t in types for k in known)


def local_of(tensor: Tensor) -> Tensor:
    """What is in memory of a DTensor, complete; any other tensor itself."""
    if not is_distributed(tensor):
        return tensor
    local = tensor._local_tensor  # type: ignore[attr-defined]
    pending = _class("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    return local.trigger_wait() if pending is not None and isinstance(local, pending) else local


@dataclass(frozen=True, slots=True)
class Description:
    """All of a DTensor but its local tensor."""

    mesh: Any
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    build: Callable[..., Tensor]

    @staticmethod
    def of(tensor: Any) -> Description:
        """The description of a DTensor."""
        _, (placements, meta, order, _) = tensor.__tensor_flatten__()
        context = (placements, meta, order, False)
        return Description(
            tensor.device_mesh, context, tensor.size(), tensor.stride(), type(tensor).__tensor_unflatten__
        )

    def around(self, local: Tensor) -> Tensor:
        """The DTensor around another local tensor; no gradient."""
        inner = {"_local_tensor": local, "device_mesh": self.mesh}
        return self.build(inner, self.context, self.size, self.stride)


@dataclass(frozen=True, slots=True)
class PackedLocal:
    """A saved DTensor: what its local tensor was packed as, and the rest."""

    packed: Any
    description: Description
