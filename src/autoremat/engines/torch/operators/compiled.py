"""Detects functions and modules compiled by ``torch.compile`` inside a step.

Compiled code goes past the dispatcher, so a step that runs some can be neither recorded nor rerun.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CALLED_BY = ("compile_wrapper", "eval_frame.py")
"""Function and file of torch through which all compiled code is called.

It is ``compile_wrapper`` in ``torch/_dynamo/eval_frame.py`` (2.13); a test checks that it still is.
"""
_BACKEND = "_torchdynamo_orig_backend"
"""Where what the compiler puts around a backend keeps that backend; a test looks whether it still does."""
_ORIGINAL = "_torchdynamo_orig_callable"
"""Where a compiled function keeps the one that was compiled; a test looks whether it still does."""


class CompiledCode(Exception):
    """The step runs compiled code; the message says where.

    It also says what to do.
    """


class _Eagerly:
    """Counts the blocks that want eager code: torch has one global switch."""

    lock = threading.Lock()
    blocks = 0
    stance: Any = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled functions and modules eagerly, operator by operator, within this block.

    Code that was compiled earlier would do part of its work unseen.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing has been compiled, and importing it takes a second
        yield
        return
    with _Eagerly.lock:
        if not _Eagerly.blocks:
            _Eagerly.stance = torch.compiler.set_stance("force_eager")
        _Eagerly.blocks += 1
    try:
        yield
    finally:
        with _Eagerly.lock:
            _Eagerly.blocks -= 1
            if not _Eagerly.blocks:
                _Eagerly.stance.__exit__(None, None, None)


def in_compiled_code() -> bool:
    """Tell whether compiled code has been called and has not returned yet."""
    if "torch._dynamo" not in sys.modules:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == _CALLED_BY[0] and code.co_filename.endswith(_CALLED_BY[1]):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_compiling() -> bool:
    """Tell whether the caller is compiled code, or code being compiled now."""
    if torch.compiler.is_compiling():
        return True
    return "torch._dynamo" in sys.modules and torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def inside_compiled(module: nn.Module) -> nn.Module:
    """Return the user's module inside a compiled one; any other module itself."""
    return module._modules.get("_orig_mod") or module


def is_compiled_callable(fn: Any) -> bool:
    """Tell whether ``torch.compile`` has made a function of another one."""
    return not isinstance(fn, nn.Module) and hasattr(fn, "get_compiler_config") and hasattr(fn, _ORIGINAL)


def options_of(compiled: Any) -> Any:
    """Return the ``options`` that ``torch.compile`` was given.

    They are None where there were none, or nothing is compiled.
    """
    if isinstance(compiled, nn.Module):
        compiler = vars(compiled).get("dynamo_ctx") or _compiler_of(compiled._compiled_call_impl)
    else:
        compiler = _compiler_of(compiled)
    backend = getattr(compiler, "callback", None)
    while (inner := getattr(backend, _BACKEND, None)) is not None:
        backend = inner
    return getattr(backend, "kwargs", {}).get("options")


def _compiler_of(compiled: Any) -> Any:
    """Return what compiles a function when it is called, or None."""
    code = getattr(compiled, "__code__", None)
    if code is None or "self" not in code.co_freevars:
        return None
    return dict(zip(code.co_freevars, compiled.__closure__, strict=True))["self"].cell_contents


def compiled_alike(compiled: Any, change: Callable[[Any], Any]) -> Any:
    """Compile a changed form of what was compiled, with the same arguments.

    Whoever has compiled a function keeps the arguments in the closure of what came of it, and nowhere else.
    """
    return _compiler_of(compiled)(change(getattr(compiled, _ORIGINAL)))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is compiled.

    That is by ``module.compile()``, or as the result of ``torch.compile(module)``.
    """
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
