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
    grad: bool

    @staticmethod
    def now() -> NumericSettings:
        """The switches as they are."""
        cudnn = torch.backends.cudnn
        return NumericSettings(
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
            torch.is_grad_enabled(),  # kernels ask for it too: mkldnn_rnn_layer makes its workspace only then
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The switches as they were, for the length of the block."""
        before = NumericSettings.now()
        self._set(before)
        try:
            yield
        finally:
            before._set(self)

    def _set(self, now: NumericSettings) -> None:
        """Change what differs from now: some of the setters are slow."""
        if self.grad != now.grad:
            torch.set_grad_enabled(self.grad)
        if self[:-1] == now[:-1]:
            return
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.deterministic_warn_only)
        cudnn = torch.backends.cudnn
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = self.cudnn
