"""Tells where a call steps aside and runs without checkpointing.

There somebody else has taken over, or what autograd saves cannot be replaced.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.autograd import forward_ad

from autoremat.engines.torch.eager.listener import is_compiling, is_listening
from autoremat.engines.torch.recording.recorder import Recorder
from autoremat.engines.torch.world.modules import reachable_modules

_SWITCHES: Final = ("gradient_checkpointing", "grad_checkpointing")
"""The libraries' names for their own checkpointing switch.

The first is that of transformers and diffusers, the second that of timm.
"""


def is_heard() -> bool:
    """Tell whether an outer recording or tape already sees every call."""
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return is_listening() or any(isinstance(mode, Recorder) for mode in stack)


def is_traced() -> bool:
    """Tell whether ``torch.jit.trace`` or an ONNX export is active.

    These want the plain callable's graph.
    """
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def obstacle() -> str:
    """Return why nothing can be rerun here; "" if it can."""
    if is_compiling():
        return _INSIDE_COMPILE
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "called inside a torch.func transform (grad, vmap, ...)"
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message():
        return "saved-tensor hooks are disabled here"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved-tensor hooks are active around the call, and they would not see what autoremat keeps"
    if torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        return "another TorchDispatchMode is active"
    if forward_ad._current_level >= 0:
        return "called inside forward-mode differentiation (a dual level), where nothing may run again"
    return ""


def own_checkpointing(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Return the first training module with its library's checkpointing on.

    "" if there is none.
    """
    for root in reachable_modules(fn, args, kwargs):
        for name, module in root.named_modules():
            if getattr(module, "training", False) and any(getattr(module, s, None) is True for s in _SWITCHES):
                return name or type(module).__name__
    return ""


_INSIDE_COMPILE: Final = "called inside torch.compile"


def tell_compiled() -> None:
    """Warn, once for every compilation.

    The compiler calls this function itself, and puts nothing of it into its graph.
    """
    warnings.warn(
        f"autoremat: {_INSIDE_COMPILE}: running without checkpointing; to have the step planned, call the checkpointed "
        "module from code that is not compiled",
        RuntimeWarning,
        stacklevel=2,
    )


tell_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports the compiler
