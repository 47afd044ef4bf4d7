"""The one place where torch adds numbers up in another order while a dispatch mode is active; here it is put right.

``torch.nn.functional.cross_entropy`` with class weights, label smoothing and the mean divides by the sum of the weights
of all targets that are not ignored. Plainly it selects these weights and adds them up; where a dispatch mode is active
it sets those of the ignored targets to zero and adds up all of them, which may give another last bit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_MASKED_FILL: Final = torch.ops.aten.masked_fill.Scalar
_MASKED_FILL_: Final = torch.ops.aten.masked_fill_.Scalar
_SUM: Final = torch.ops.aten.sum.default
_CROSS_ENTROPY: Final = F.cross_entropy.__code__
_DEPTH: Final = 4
"""So many frames up from an operator, at most, is the function that called it."""

_LIBRARY: Final = torch.library.Library("autoremat", "DEF")
_LIBRARY.define("sum_of_kept(Tensor weights, Tensor ignored) -> Tensor")


def _sum_of_kept(weights: Tensor, ignored: Tensor) -> Tensor:
    return weights.masked_select(ignored.logical_not()).sum()


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("sum_of_kept", _sum_of_kept, _device)
torch.library.register_fake("autoremat::sum_of_kept", lambda weights, ignored: weights.new_empty(()), lib=_LIBRARY)


class Smoothing:
    """Watches the operators of a forward go by, and replaces the sum in question by that of plain training."""

    __slots__ = ("_expected", "_weights")

    def __init__(self) -> None:
        self._expected = False
        self._weights: tuple[Tensor, Tensor] | None = None

    def replaced(self, func: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """The operator to run instead, with its arguments; nearly always the same ones."""
        if func is _SUM:
            if self._weights is not None and args[0] is self._weights[0]:
                (weights, ignored), self._weights = self._weights, None
                return torch.ops.autoremat.sum_of_kept.default, (weights, ignored)
        elif func is _MASKED_FILL:  # of the targets: only where there are weights
            self._expected = _inside_cross_entropy()
        elif func is _MASKED_FILL_ and self._expected:
            self._expected = False
            self._weights = args[0], args[1]
        return func, args


def _inside_cross_entropy() -> bool:
    """Whether the operator was called by torch's own function, and not by somebody who means what he writes."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame.f_code is _CROSS_ENTROPY:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
