"""Reads and restores global state that decides what operators compute.

This is torch's global switches and the random generators.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

_TINY = 5e-324
"""A denormal number, which tells whether torch flushes such numbers to zero."""

_Pair = tuple[Callable[[], Any], Callable[[Any], object]]


def _pairs(*names: str) -> list[_Pair]:
    """Return getters and setters of the switches that this torch has."""
    known = [n for n in names if hasattr(torch._C, f"_get_{n}")]
    return [(getattr(torch._C, f"_get_{n}"), getattr(torch._C, f"_set_{n}")) for n in known]


def _older(read: Callable[[], Any], write: Callable[[Any], object]) -> _Pair:
    """Wrap a switch that predates ``fp32_precision``.

    torch refuses to read such a switch while it contradicts the newer ones (``ATen/Context.cpp``, 2.13).
    """

    def read_if_possible() -> Any:
        try:
            return read()
        except RuntimeError:
            return None

    return read_if_possible, lambda value: None if value is None else write(value)


def _precision(backend: str, op: str) -> _Pair:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    return functools.partial(get, backend, op), functools.partial(put, backend, op)


def _determinism() -> tuple[bool, bool]:
    return torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()


_ON_GPU = torch.version.cuda is not None or torch.version.hip is not None
"""Whether this torch has CUDA or HIP.

Without them torch has the switches of their libraries, but nothing reads these.
"""
_GPU_SWITCHES: tuple[_Pair, ...] = (
    *_pairs(
        "cudnn_enabled",
        "cudnn_benchmark",
        "cudnn_deterministic",
        "cudnn_depthwise_kernel",
        "cublas_allow_fp16_accumulation",
    ),
    *(
        (get, lambda value, put=put: put(*value))
        for get, put in _pairs(
            "cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction"
        )
    ),
)
_SWITCHES: tuple[_Pair, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),  # a sum is split by threads
    (lambda: _TINY * 1.0 == 0.0, torch.set_flush_denormal),
    (_determinism, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])),
    *_pairs("mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled"),
    *(_GPU_SWITCHES if _ON_GPU else ()),
    # The older switches come first, because setting one of them also sets newer ones.
    _older(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(_older(get, put) for get, put in _pairs(*(("cudnn_allow_tf32",) if _ON_GPU else ()), "onednn_allow_tf32")),
    _precision("generic", "all"),
    *(
        _precision(backend, op)
        for backend in (*(("cuda",) if _ON_GPU else ()), "mkldnn")
        for op in ("all", "matmul", "conv", "rnn")
    ),
)


_READERS = [read for read, _ in _SWITCHES]


class NumericSettings(NamedTuple):
    """The switches at one moment, and whether gradients were enabled.

    Gradients matter because ``mkldnn_rnn_layer`` allocates a workspace only with them.
    """

    values: tuple[Any, ...]
    grad_enabled: bool

    @staticmethod
    def now() -> NumericSettings:
        """Read the switches; returns the last object if nothing has changed."""
        values, grad_enabled = tuple([read() for read in _READERS]), torch.is_grad_enabled()
        last = _LAST[grad_enabled]
        if last is None or last.values != values:
            last = _LAST[grad_enabled] = NumericSettings(values, grad_enabled)
        return last

    def switch_to(self, other: NumericSettings) -> None:
        """Change the switches from these to those of another moment."""
        if other is self:
            return
        torch._C._set_grad_enabled(other.grad_enabled)
        if other.values is not self.values and other.values != self.values:  # hardly ever true
            for (read, write), value in zip(_SWITCHES, other.values, strict=True):
                if read() != value:  # some of the setters are slow
                    write(value)


_LAST: list[NumericSettings | None] = [None, None]
"""The settings read last, without and with gradients."""


class RandomStates(NamedTuple):
    """The states of torch's, Python's and NumPy's global random generators."""

    torch: tuple[tuple[torch.Generator, bytearray], ...]
    python: Any
    numpy: Any

    @staticmethod
    def now() -> RandomStates:
        """Read the states; takes some ten microseconds."""
        numpy_random = getattr(sys.modules.get("numpy"), "random", None)
        return RandomStates(
            tuple((g, state_of(g)) for g in _default_generators()),
            random.getstate(),
            numpy_random.get_state() if numpy_random is not None else None,
        )

    def restore(self) -> None:
        """Restore the states of all generators."""
        for generator, state in self.torch:
            set_state(generator, state)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _default_generators() -> Sequence[torch.Generator]:
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.default_generator, *(torch.cuda.default_generators if used else ())]


def state_of(generator: torch.Generator) -> bytearray:
    """Return the state of a generator as bytes.

    A tensor would appear in the account of memory.
    """
    if torch._C._len_torch_dispatch_stack():  # a mode might make it a fake one
        with _disable_current_modes():
            return bytearray(generator.get_state().numpy())
    return bytearray(generator.get_state().numpy())


def next_numbers_of(generator: torch.Generator) -> tuple[float, int]:
    """Return what a generator of the CPU draws next, without drawing it.

    They tell its state: what is left of the last pair of normal numbers, and the rest. Asking for the state itself
    makes a tensor of 5,056 bytes, which would be in the account of a step.
    """
    with _LOOKING, _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
        ahead = generator.clone_state()
        return float(_NORMAL.normal_(generator=ahead)), int(_WHOLE.random_(generator=ahead))


_LOOKING = threading.Lock()
_NORMAL, _WHOLE = torch.empty((), dtype=torch.float64), torch.empty((), dtype=torch.int64)
"""Memory for these numbers, so that looking at them takes none."""


def set_state(generator: torch.Generator, state: bytearray) -> None:
    """Put a generator into an earlier state."""
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
