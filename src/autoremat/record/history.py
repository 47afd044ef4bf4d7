"""What has made a tensor, as far as torch tells.

Of what was viewed without gradients, and then overwritten with them, torch refuses to tell, though such a tensor may be
read without gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_leaf(tensor: Tensor) -> bool:
    """Whether nothing differentiable has made a tensor."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return False


def node_of(tensor: Tensor) -> Any:
    """The node of the graph that has made a tensor; None where there is none, or where torch refuses to say."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None
