"""Asks which node made a tensor, without side effects.

A view whose memory has been overwritten has a stale ``grad_fn``, and torch rebuilds it when somebody reads it
(``DifferentiableViewMeta`` in ``torch/csrc/autograd/variable.h``, 2.13). In plain training this happens while the next
call reads the view. The order in which nodes are made decides the order in which gradients are added up, and so their
last bit. So this file never reads ``grad_fn`` of such a view before the user's code has.

If a view was taken without gradients and then overwritten with them, torch raises when ``grad_fn`` is read, although
such a tensor may be read without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_leaf(tensor: Tensor) -> bool:
    """Tell whether nothing differentiable made a tensor; False if asking has effects."""
    return not tensor.requires_grad or (not _may_be_anew(tensor) and tensor.is_leaf)


def node_of(tensor: Tensor) -> Any:
    """Return the node that made a tensor.

    None where there is no node, or where asking would have effects.
    """
    return None if not tensor.requires_grad or _may_be_anew(tensor) else tensor.grad_fn


def node_made(tensor: Tensor) -> Any:
    """Return the node of a tensor that a call has just used.

    Right after a call made, overwrote or read a tensor with gradients enabled, its node exists. None where torch
    refuses to say.
    """
    if not torch.is_grad_enabled():
        return node_of(tensor)
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def _may_be_anew(tensor: Tensor) -> bool:
    """Tell whether torch may rebuild the tensor's node when asked for it.

    It never does so for a parameter, whose data may not exist yet.
    """
    kind = type(tensor)
    if kind is not Tensor and (kind is nn.Parameter or isinstance(tensor, nn.Parameter)):  # isinstance is slow
        return False
    return tensor._is_view() and tensor._version > 0
