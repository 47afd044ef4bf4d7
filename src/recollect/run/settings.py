"""What decides, beside its arguments, what an operator computes: torch's global switches and random generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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


class RandomStates(NamedTuple):
    """The states of torch's, Python's and NumPy's global random generators."""

    torch: tuple[tuple[torch.Generator, bytearray], ...]
    python: Any
    numpy: Any

    @staticmethod
    def now() -> RandomStates:
        """The states at this moment; takes some ten microseconds."""
        numpy_random = getattr(sys.modules.get("numpy"), "random", None)
        return RandomStates(
            tuple((g, state_of(g)) for g in _default_generators()),
            random.getstate(),
            numpy_random.get_state() if numpy_random is not None else None,
        )

    def restore(self) -> None:
        """Put all of them back."""
        for generator, state in self.torch:
            set_state(generator, state)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _default_generators() -> Sequence[torch.Generator]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if used else ())]


def state_of(generator: torch.Generator) -> bytearray:
    """The state of a generator; not as a tensor, which would take part in the account of memory."""
    return bytearray(generator.get_state().numpy())


def set_state(generator: torch.Generator, state: bytearray) -> None:
    """Put a generator into an earlier state."""
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
