"""Functions and modules that ``torch.compile`` has compiled, met inside a step.

What compiled code does goes past the dispatcher, so a step that runs some can be neither recorded nor run again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_CALLED_BY = ("compile_wrapper", "eval_frame.py")
"""Function and file of torch through which everything compiled is called; a test looks whether it still is."""


class CompiledCode(Exception):
    """The step runs compiled code; the message says where, and what to do."""


class _Eagerly:
    """How many blocks want compiled code to run eagerly; torch has one switch for all threads."""

    lock = threading.Lock()
    blocks = 0
    stance: Any = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Within this block compiled functions and modules run as they are written, operator by operator.

    Whatever they were compiled to before would do part of its work unseen.
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
    """Whether something compiled has been called and has not returned yet."""
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
    """Whether we are called by compiled code, or by code that is just being compiled."""
    if torch.compiler.is_compiling():
        return True
    return "torch._dynamo" in sys.modules and torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is compiled: by ``module.compile()``, or as what ``torch.compile(module)`` returns."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules
