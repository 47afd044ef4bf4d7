"""DTensors and jagged nested tensors: wrappers around a tensor in memory.

Their operators run other operators on the tensor inside. So recorder and tape let the wrapper decompose its operators,
see those on the inner tensors and the collectives between them, and treat a saved wrapper as its inner tensor plus a
description. The offsets of a nested tensor, a few numbers, stay with the description.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autoremat.engines.torch.operators.history import is_leaf

PLAIN: Final = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})
"""Types of tensors that wrap no other tensor; comparing types is fastest."""


def _class(module: str, name: str) -> Any:
    """Return a class if its module is loaded, else None.

    A class whose module is not loaded has no instances.
    """
    return getattr(sys.modules.get(module), name, None)


def is_distributed(tensor: Any) -> bool:
    """Tell whether this is a DTensor."""
    kind = _class("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def is_jagged(tensor: Any) -> bool:
    """Tell whether this is a nested tensor of the jagged layout."""
    kind = _class("torch.nested._internal.nested_tensor", "NestedTensor")
    return kind is not None and isinstance(tensor, kind)


def has_inside(tensor: Any) -> bool:
    """Tell whether this tensor wraps another one, which is in memory."""
    return type(tensor) not in PLAIN and (is_jagged(tensor) or is_distributed(tensor))


def prepare_jagged() -> None:
    """Let torch make its global dummy for jagged tensors now.

    The first nested tensor would make it (``_nt_view_dummy`` in ``torch/nested/_internal/nested_tensor.py``, 2.13), and
    it is no part of a step.
    """
    module = sys.modules.get("torch.nested._internal.nested_tensor")
    if module is not None and hasattr(module, "_nt_view_dummy"):
        module._nt_view_dummy()


def knows_ragged_sizes(mode: FakeTensorMode) -> None:
    """Allow jagged fake tensors in this mode: their sizes are symbols."""
    if mode.shape_env is None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # takes half a second

        mode.shape_env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        mode.static_shapes = True


def is_apart(tensor: Tensor) -> bool:
    """Tell whether a saved tensor is kept as its inner tensor."""
    if is_jagged(tensor):
        return not (is_leaf(tensor) and tensor.requires_grad)
    return is_distributed(tensor) and not is_leaf(tensor)


def is_taken_apart(types: Collection[type]) -> bool:
    """Tell whether operators on these classes run others on inner tensors."""
    known = (
        _class("torch.distributed.tensor", "DTensor"),
        _class("torch.distributed._functional_collectives", "AsyncCollectiveTensor"),
        _class("torch.nested._internal.nested_tensor", "NestedTensor"),
    )
    return any(k is not None and issubclass(t, k) for t in types for k in known)


def local_of(tensor: Tensor) -> Tensor:
    """Return the tensor in memory behind a DTensor or a jagged tensor.

    That of a DTensor is complete: collectives are waited for. Any other tensor is returned as it is.
    """
    if type(tensor) in PLAIN:
        return tensor
    if is_jagged(tensor):
        values: Tensor = tensor._values  # type: ignore[assignment]
        return values
    local = tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return _waited(local) if is_pending(local) else local


def _waited(pending: Any) -> Tensor:
    """Wait for what a collective makes, with modes disabled.

    An active fake mode would wait for nothing.
    """
    with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
        waited: Tensor = pending.trigger_wait()
    return waited


def is_pending(tensor: Any) -> bool:
    """Tell whether this stands for the unfinished result of a collective."""
    kind = _class("torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    return kind is not None and isinstance(tensor, kind)


@dataclass(frozen=True, slots=True)
class Description:
    """Everything about a DTensor but its local tensor."""

    mesh: Any
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    build: Callable[..., Tensor]

    @staticmethod
    def of(tensor: Any) -> Description:
        """Describe a DTensor."""
        _, (placements, meta, order, _) = tensor.__tensor_flatten__()
        context = (placements, meta, order, False)
        return Description(
            tensor.device_mesh, context, tensor.size(), tensor.stride(), type(tensor).__tensor_unflatten__
        )

    def around(self, local: Tensor) -> Tensor:
        """Make the DTensor around another local tensor, without a gradient."""
        inner = {"_local_tensor": local, "device_mesh": self.mesh}
        return self.build(inner, self.context, self.size, self.stride)


def distributed_like(tensor: Tensor, local: Tensor) -> Tensor:
    """Make a DTensor like this one around another local tensor.

    The gradient, if there is one, is not copied.
    """
    made = Description.of(tensor).around(local)
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


@dataclass(frozen=True, slots=True)
class Jagged:
    """Everything about a jagged nested tensor but its values."""

    offsets: Tensor
    options: dict[str, Any]
    build: Callable[..., Tensor]

    @staticmethod
    def of(tensor: Any) -> Jagged:
        """Describe a nested tensor."""
        options = {"lengths": tensor._lengths, "_ragged_idx": tensor._ragged_idx}
        options["_metadata_cache"] = dict(tensor._metadata_cache)
        return Jagged(tensor._offsets, options, type(tensor))

    def around(self, values: Tensor) -> Tensor:
        """Make the nested tensor around other values, without a gradient."""
        return self.build(values, self.offsets, **self.options)

    def converted(self, convert: Callable[[Tensor], Tensor]) -> Jagged:
        """Convert the offsets, the lengths, and the numbers read off them."""
        lengths = self.options["lengths"]
        options: dict[str, Any] = {"lengths": lengths if lengths is None else convert(lengths)}
        options["_ragged_idx"] = self.options["_ragged_idx"]
        options["_metadata_cache"] = {k: convert(t) for k, t in self.options["_metadata_cache"].items()}
        return Jagged(convert(self.offsets), options, self.build)


def description_of(tensor: Tensor) -> Description | Jagged:
    """Describe everything about a DTensor or jagged tensor but its memory."""
    return Jagged.of(tensor) if is_jagged(tensor) else Description.of(tensor)


@dataclass(frozen=True, slots=True)
class PackedLocal:
    """A saved wrapper taken apart: its packed inner tensor and its description."""

    packed: Any
    description: Description | Jagged
