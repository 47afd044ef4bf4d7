"""Counts Python numbers that autograd saves out of reach of hooks.

The 0.5 of ``x * 0.5`` becomes a tensor of 8 bytes that no saved-tensor hook sees (torch 2.13). No schema says whether
an operator saves such a number, so each is called once, on tensors of one element, under the allocator's account.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Number
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from autoremat.engines.torch.operators.facts import tensors_in
from autoremat.engines.torch.operators.signature import CallSignature, TensorSpec, thaw
from autoremat.engines.torch.operators.timing import allocations_of

_SAVED: Final[dict[Any, int]] = {}


def saved_number_bytes(calls: Iterable[CallSignature]) -> int:
    """Add up the bytes of numbers that these calls, with gradients, save."""
    return sum(_of_call(c) for c in calls)


def has_number(call: CallSignature) -> bool:
    """Tell whether a number stands where the schema has a tensor."""
    declared = zip(call.args, call.func._schema.arguments, strict=False)
    return any(isinstance(given, Number) and argument.type.kind() == "TensorType" for given, argument in declared)


def _of_call(call: CallSignature) -> int:
    key = call.func, tuple((a.dtype if isinstance(a, TensorSpec) else type(a)) for a in call.args)
    if key not in _SAVED:
        try:
            _SAVED[key] = _measured(call)
        except Exception:  # noqa: BLE001 - one element does not suit every operator: count every number, then
            _SAVED[key] = sum(torch.tensor(a).nbytes for a in call.args if isinstance(a, Number))
    return _SAVED[key]


def _measured(call: CallSignature) -> int:
    """Measure what a call allocates and keeps besides its result."""
    with _disable_current_modes(), torch.enable_grad():
        args, kwargs = thaw(call.args, _of_one_element), thaw(call.kwargs, _of_one_element)
        sizes, out = allocations_of(call.func, args, kwargs)
    return max(0, sum(sizes) - sum(t.untyped_storage().nbytes() for t in tensors_in(out)))


def _of_one_element(spec: TensorSpec) -> Tensor:
    tensor = torch.ones((1,) * len(spec.size), dtype=spec.dtype)
    return tensor.requires_grad_(spec.dtype.is_floating_point or spec.dtype.is_complex)
