"""Sizes of fake tensors as numbers, and calls of a joint graph as what their cost is known by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from autoremat.engines.torch.compiled.joint import NotPlannable, tensor_of
from autoremat.engines.torch.compiled.torch_names import Layout, size_hint
from autoremat.engines.torch.operators.signature import CallSignature, Items, TensorSpec
from autoremat.engines.torch.operators.timing import extent_of


def number_of(size: Any) -> Any:
    """A size as a number: what it is now, where it is a symbol.

    Raises:
        NotPlannable: it depends on data.
    """
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size
    known = size_hint(size)
    if known is None:
        raise NotPlannable(f"the size {size} depends on data")
    return known


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the memory that a fake tensor looks at."""
    return int(number_of(tensor.untyped_storage().nbytes()))


def spec_of_node(tensor: Tensor) -> TensorSpec:
    """Everything about a fake tensor but its numbers."""
    size, stride = (tuple(map(number_of, shape)) for shape in (tensor.shape, tensor.stride()))
    spec = TensorSpec(tensor.dtype, size, stride, tensor.device)
    return spec._replace(beyond=max(0, bytes_of(tensor) // tensor.itemsize - extent_of(spec)))


def signature_of_node(node: Node) -> CallSignature | None:
    """The call of a node without the numbers in its tensors; None where it calls none of torch's operators."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    args, kwargs = tuple(map(_frozen, node.args)), tuple((k, _frozen(v)) for k, v in node.kwargs.items())
    return CallSignature(node.target, args, Items(dict, kwargs))


def laid_out(call: CallSignature, layouts: Sequence[Layout]) -> CallSignature | None:
    """The same call on tensors that lie in memory in another way; None where these are no tensors of its sizes."""
    left = list(layouts)

    def placed(tree: Any) -> Any:
        if isinstance(tree, TensorSpec):
            size, stride = left.pop(0) if left else ((-1,), ())
            if size != tree.size:
                raise _OtherSizes
            return tree._replace(stride=stride, beyond=0)
        if isinstance(tree, CallSignature | Items):
            return type(tree)(*map(placed, tree))
        return tuple(map(placed, tree)) if type(tree) is tuple else tree

    try:
        found: CallSignature = placed(call)
    except _OtherSizes:
        return None
    return None if left else found


class _OtherSizes(Exception):
    """What was to be laid out has other sizes."""


def _frozen(tree: Any) -> Any:
    """Arguments of a node as a hashable tree."""
    if isinstance(tree, Node):
        tensor = tensor_of(tree)
        return number_of(tree.meta.get("val")) if tensor is None else spec_of_node(tensor)
    if isinstance(tree, tuple):
        return tuple(map(_frozen, tree))
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return Items(list, tuple(map(_frozen, tree)))
    return number_of(tree)
