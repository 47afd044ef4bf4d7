"""Tells how the elements of a tensor fill its memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements fill their memory without gaps or overlaps.

    The dimensions may be in any order.
    """
    return is_whole(tensor.shape, tensor.stride())


def is_whole(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell the same of a tensor of this shape and strides."""
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda d: (d[1], d[0])):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def covers_storage(tensor: Tensor) -> bool:
    """Tell whether a tensor fills its storage without gaps."""
    return is_dense(tensor) and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
