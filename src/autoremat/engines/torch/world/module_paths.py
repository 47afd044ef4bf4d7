"""Tells which module runs now."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn


class ModulePaths:
    """Tracks the running module while entered, by torch's global module hooks."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._names = {id(m): name for root in roots for name, m in root.named_modules()}
        self._stack: list[str] = []
        self._exits = ExitStack()

    def current(self) -> str:
        """Return the path of the innermost running module; "" outside all."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> ModulePaths:
        hooks = nn.modules.module
        enter = hooks.register_module_forward_pre_hook(self._entered)
        leave = hooks.register_module_forward_hook(self._left, always_call=True)
        self._exits.callback(enter.remove)
        self._exits.callback(leave.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def _entered(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
