"""Finds what a backward pass could start from in a step's result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def differentiable_outputs(result: Any) -> list[Tensor]:
    """List the outputs that a backward pass would start from.

    That is the ``loss`` if there is one, else the only scalar that requires grad, else every tensor that does.
    """
    loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        return [loss]
    tensors = [t for t in _tensors_of(result) if t.requires_grad]
    scalars = [t for t in tensors if t.numel() == 1]
    return scalars if len(scalars) == 1 else tensors


def _tensors_of(tree: Any) -> list[Tensor]:
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = [getattr(tree, f.name) for f in fields(tree)]
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]
