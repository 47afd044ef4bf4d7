"""The listener: a function mode that hands on every torch call.

It decides nothing. Below Python nothing is switched on: autograd, autocast, composites and kernels are those of plain
training.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

is_compiling = torch.compiler.is_compiling
_ONE_KERNEL: Final = frozenset(
    f
    for name in (
        "layer_norm", "dropout", "rms_norm", "group_norm", "batch_norm", "embedding", "softmax", "log_softmax", "relu",
        "silu", "mish", "gelu", "linear", "pad", "one_hot", "hardtanh", "leaky_relu", "elu", "selu", "celu", "glu",
    )
    if isinstance(f := getattr(F, name, None), types.FunctionType)
)  # fmt: skip
"""Functions of ``torch.nn.functional`` that are a check and one kernel.

Looking into them would show nothing.
"""


class Listener(TorchFunctionMode):
    """Hands on every call of torch's Python API.

    Functions of ``torch.nn.functional`` that are written in Python are looked into: what they call are the calls.

    Args:
        heard: called with function, arguments and keyword arguments; makes the call and returns its result.
    """

    def __init__(self, heard: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.heard = heard
        self._inside: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Hand on one call.

        torch.compile traces through this method, so while it compiles, only the call itself is made.
        """
        if is_compiling():
            return func(*args, **(kwargs or {}))
        return self.heard(func, args, kwargs or {})

    def is_made_of_others(self, func: Any) -> bool:
        """Tell whether a function is looked into, call by call.

        It is if torch wrote it in Python in ``torch.nn.functional``.
        """
        return (
            type(func) is types.FunctionType
            and func.__module__ == "torch.nn.functional"
            and func not in _ONE_KERNEL
            and func not in self._inside
        )

    def look_into(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function so that the calls inside are heard."""
        self._inside.append(func)
        try:
            with self:
                return _open(func)(*args, **kwargs)
        finally:
            self._inside.pop()


_OPEN: dict[Any, Any] = {}


class _Names(dict[str, Any]):
    """The globals of a function's module, some of them replaced.

    All others are looked up when they are used.
    """

    def __init__(self, module: dict[str, Any]) -> None:
        super().__init__({n: _nobody for n in module if n.startswith("has_torch_function")})
        self["__builtins__"] = module["__builtins__"]
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def _open(func: types.FunctionType) -> Any:
    """Copy a function without its check for torch functions.

    A function of ``torch.nn.functional`` (``torch/nn/functional.py``, 2.13) first asks ``has_torch_function`` whether
    somebody overrides it. The copy is told that nobody does, and so goes on to its calls.
    """
    if func not in _OPEN:
        names = _Names(func.__globals__)
        copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _OPEN[func] = copy
    return _OPEN[func]


def _nobody(*args: Any) -> bool:
    return False


def is_listening() -> bool:
    """Tell whether a listener is active in this thread."""
    stack = _get_current_function_mode_stack()
    return any(isinstance(mode, Listener) for mode in stack)
