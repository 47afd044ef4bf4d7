"""Reads the Python stack: the user's line, and autograd's Python code."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_OURS = Path(__file__).parents[3]
_LIBRARY = (
    str(Path(torch.__file__).parent),
    *(str(_OURS / n) for n in ("engines", "api.py", "largest.py")),
)
_TYPED_IN = ("<stdin>", "<ipython-input")


def user_line() -> str:
    """Return ``file:line`` of the innermost frame outside torch and autoremat."""
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        generated = filename.startswith("<") and not filename.startswith(_TYPED_IN)
        if not generated and not filename.startswith(_LIBRARY):
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def in_python_function() -> bool:
    """Tell whether a custom ``autograd.Function`` runs its Python backward."""
    frame = sys._getframe(2)
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "apply" and frame.f_code.co_filename.endswith("function.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
