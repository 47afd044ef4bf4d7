"""Tells which calls make or change tensors, from torch's own names."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from autoremat.engines.torch.operators.collectives import NAMESPACES

LOOKS: Final = frozenset(
    {"size", "dim", "stride", "numel", "nelement", "element_size", "is_contiguous", "storage_offset", "__len__",
     "is_floating_point", "is_complex", "ndimension", "get_device", "__repr__", "__format__", "__hash__", "item",
     "tolist", "__bool__", "__int__", "__float__", "__index__", "is_same_size", "is_nonzero", "is_signed", "equal",
     "allclose", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_", "__contains__",
     "is_storage", "is_tensor", "is_inference", "is_conj", "is_neg", "is_pinned", "is_shared", "result_type",
     "broadcast_shapes", "_is_view", "is_distributed", "has_names", "dim_order", "sym_size", "__dir__"}
)  # fmt: skip
"""Calls that only look: they make no tensor and change none."""
ESCAPES: Final = frozenset(
    {"data_ptr", "numpy", "__array__", "__dlpack__", "untyped_storage", "storage", "_typed_storage", "share_memory_",
     "to_dlpack", "__array_wrap__", "__cuda_array_interface__"}
)  # fmt: skip
"""Calls that may hand a tensor's memory to code outside torch.

From then on that code may change the memory unseen.
"""
_PASSES: Final = frozenset({"backward", "grad"})
_OF_AUTOGRAD: Final = ("torch.autograd", "torch._tensor", "torch.autograd.functional")
_GETTERS: Final = frozenset({"T", "mT", "H", "mH", "data", "real", "imag", "grad", "_base"})


def name_of(func: Any) -> str:
    """Return the name of what is called."""
    return str(getattr(func, "__name__", func))


def only_looks(func: Any, name: str) -> bool:
    """Tell whether a call makes no tensor and changes none."""
    if name in LOOKS:
        return True
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") not in _GETTERS
    return name == "__set__" and getattr(func.__self__, "__name__", "") != "data"


def looks(func: Any) -> bool:
    """Ask ``only_looks``, and remember its answer for functions that stay."""
    if type(func) not in _OF_C:
        return only_looks(func, name_of(func))
    known = _KNOWN.get(func)
    if known is None:
        known = only_looks(func, name_of(func))
        if not isinstance(getattr(func, "__self__", None), torch.Tensor):
            _KNOWN[func] = known
    return known


_OF_C: Final = frozenset((types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodWrapperType))
"""Types of functions written in C, which can be looked up.

Such a function equals only itself.
"""
_KNOWN: Final[dict[Any, bool]] = {}


def is_pass(func: Any, name: str) -> bool:
    """Tell whether a call is a backward pass."""
    return name in _PASSES and getattr(func, "__module__", "") in _OF_AUTOGRAD


def is_out_of_sight() -> bool:
    """Tell whether a torch.func transform or a user's dispatch mode is active."""
    return _transform() is not None or _modes() > _OURS.modes


@contextmanager
def in_sight() -> Iterator[None]:
    """Take the present dispatch modes for ours, within the block."""
    before, _OURS.modes = _OURS.modes, _modes()
    try:
        yield
    finally:
        _OURS.modes = before


class _Ours(threading.local):
    modes = 0


_OURS = _Ours()

_transform, _modes = torch._C._functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack


def is_collective(func: Any) -> bool:
    """Tell whether an operator talks to other processes.

    Its result may be filled after it has returned.
    """
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name.partition("::")[0] in NAMESPACES
    return isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES
