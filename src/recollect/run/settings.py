"""The global switches of torch that change what an operator computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class NumericSettings(NamedTuple):
    """The switches at one moment."""

    matmul_precision: str
    deterministic: bool
    deterministic_warn_only: bool
    cudnn: tuple[bool, bool, bool, bool]

    @staticmethod
    def now() -> NumericSettings:
        """The switches as they are."""
        cudnn = torch.backends.cudnn
        return NumericSettings(
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The switches as they were, for the length of the block."""
        before = NumericSettings.now()
        if before == self:
            yield
            return
        self._set()
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.deterministic_warn_only)
        cudnn = torch.backends.cudnn
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = self.cudnn
