"""Tells whether two calls of an operator are the same.

They are if the operator, the shapes, dtypes and strides of the tensors, and all plain arguments are equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """Everything about a tensor but its numbers.

    ``beyond`` counts elements of its memory outside of it. It is 0 but for the few operators that copy these as well.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    beyond: int = 0


class Items(NamedTuple):
    """A list or dict, frozen: its type and its content."""

    kind: type
    content: tuple[Any, ...]


class CallSignature(NamedTuple):
    """One operator call without the numbers in its tensors; hashable."""

    func: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Items


def signature_of(func: torch._ops.OpOverload, args: Any, kwargs: Any) -> CallSignature:
    """Return the signature of a call."""
    return CallSignature(func, freeze(tuple(args)), freeze(kwargs))


def freeze(tree: Any) -> Any:
    """Turn nested arguments into a hashable tree, tensors into ``TensorSpec``."""
    if isinstance(tree, Tensor):
        return spec_of(tree)
    if isinstance(tree, torch.Generator):
        return None  # measuring must not draw from the user's generator
    if isinstance(tree, dict):
        return Items(dict, tuple((k, freeze(v)) for k, v in tree.items()))
    if isinstance(tree, list):
        return Items(list, tuple(freeze(v) for v in tree))
    if isinstance(tree, tuple):
        return tuple(freeze(v) for v in tree)
    return tree


def thaw(tree: Any, make: Any) -> Any:
    """Turn a frozen tree back into arguments, with ``make(spec)`` for every tensor."""
    if isinstance(tree, TensorSpec):
        return make(tree)
    if isinstance(tree, Items):
        pairs = tree.content
        return {k: thaw(v, make) for k, v in pairs} if tree.kind is dict else [thaw(v, make) for v in pairs]
    if type(tree) is tuple:
        return tuple(thaw(v, make) for v in tree)
    return tree


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return the spec of a tensor.

    Opaque layouts have no strides; nested tensors have no size either.
    """
    if tensor.is_nested:
        return TensorSpec(tensor.dtype, (), (), tensor.device)
    stride = tuple(tensor.stride()) if tensor.layout is torch.strided else ()
    return TensorSpec(tensor.dtype, tuple(tensor.shape), stride, tensor.device)
