"""Kinds of input: what makes two calls of a callable the same to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoremat.record.compiled import is_compiled
from autoremat.record.local import Jagged, is_jagged, local_of
from autoremat.record.parallel import parallel_of
from autoremat.record.parallel import signature as parallel_signature
from autoremat.record.world import reachable_modules


def input_signature(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What makes two calls the same kind: everything that usually decides which operators run.

    Shapes, strides, dtypes, devices and ``requires_grad`` of tensor arguments; other arguments by value where they
    are numbers, strings or flags; of every module that the callable can reach, ``training``, and which parameters
    require and have gradients; autocast.
    """
    leaves, structure = torch.utils._pytree.tree_flatten((tuple(args), kwargs))
    roots = reachable_modules(fn, args, kwargs)
    modules = _all_modules(roots)
    flags = tuple([(m.training, is_compiled(m)) for m in modules])
    tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
    tensors = tuple([_tensor_signature(t) for table in tables for t in table.values() if t is not None])
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    around = parallel_signature(parallel_of(roots))
    return structure, tuple(_leaf_signature(x) for x in leaves), flags, tensors, autocast, around


def _all_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """These modules and all inside them, each once; ``nn.Module.modules`` takes several times as long."""
    found: dict[int, nn.Module] = {}
    pending = list(roots)
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            pending += [m for m in module._modules.values() if m is not None]
    return list(found.values())


def _tensor_signature(tensor: Tensor) -> tuple[Any, ...]:
    shape = None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return tensor.requires_grad, tensor.is_leaf and tensor.grad is not None, tensor.dtype, shape


def _leaf_signature(x: Any) -> Any:
    if is_jagged(x):  # every one has a size of its own, told by its offsets
        inside = Jagged.of(x)
        return "jagged", _leaf_signature(local_of(x)), tuple(inside.offsets.shape), x.requires_grad
    if isinstance(x, Tensor):
        stride = tuple(x.stride()) if x.layout is torch.strided else None
        grad = x.is_leaf and x.grad is not None
        return x.dtype, tuple(x.shape), stride, x.device, x.requires_grad, grad, getattr(x, "placements", None)
    if isinstance(x, (int, float, str, bool, type(None), complex, bytes)):
        return type(x), x
    return id(x) if isinstance(x, nn.Module) else type(x)
