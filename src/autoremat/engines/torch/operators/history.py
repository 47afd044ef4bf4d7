"""What has made a tensor, as far as torch tells without doing anything.

To tell what has made a view whose memory has been overwritten since, torch makes the view's node anew, there and then;
in plain training that happens while the next call reads the view. Which of two nodes was made first decides in which
order gradients are added up, and so their last bit. So nobody here asks that of such a view before the user's code has.

Of what was viewed without gradients, and then overwritten with them, torch refuses to tell, though such a tensor may be
read without gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_leaf(tensor: Tensor) -> bool:
    """Whether nothing differentiable has made a tensor; False where asking might do something."""
    return not tensor.requires_grad or (not _may_be_anew(tensor) and tensor.is_leaf)


def node_of(tensor: Tensor) -> Any:
    """The node of the graph that has made a tensor; None where there is none, or where asking might do something."""
    return None if not tensor.requires_grad or _may_be_anew(tensor) else tensor.grad_fn


def node_made(tensor: Tensor) -> Any:
    """The same for what a call has just made, overwritten or read: with gradients, its node is there.

    None where torch refuses to say.
    """
    if not torch.is_grad_enabled():
        return node_of(tensor)
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


def _may_be_anew(tensor: Tensor) -> bool:
    """Whether torch may have to make the node of a tensor anew: never of a parameter, which may not be there yet."""
    kind = type(tensor)
    if kind is not Tensor and (kind is nn.Parameter or isinstance(tensor, nn.Parameter)):  # the last is slow
        return False
    return tensor._is_view() and tensor._version > 0
