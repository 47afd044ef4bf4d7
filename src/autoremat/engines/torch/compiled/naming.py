"""Names that a user knows for what stands in a joint graph: parameters, modules, lines of code."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.fx.node import Node

from autoremat.engines.torch.compiled.torch_names import gradient_of, input_of, position_of

_PART: Final = re.compile(r"(?:\._modules|\._parameters|\._buffers)?(?:\['([^']+)'\]|\[(\d+)\]|\.(\w+))")
"""One step from a module or a container to what it holds, as the compiler writes it."""
_ROOT: Final = re.compile(r"^[LG]\['([^']+)'\]")
_LIBRARY: Final = str(Path(torch.__file__).parent)
_OWN: Final = str(Path(__file__).parents[2]), str(Path(__file__).parents[3] / "checkpointed.py")
_WRAPPING: Final = frozenset({"forward", "__wrapped__", "_forward", "__self__", "module", "_orig_mod", "session", "fn"})
"""What stands between a checkpointed callable and the user's."""


@dataclass(frozen=True)
class Names:
    """What the inputs of a graph are called.

    Attributes:
        inputs: of every input of the compiler's graph, in order; "" where it has none.
        kinds: of the same inputs: ``parameter``, ``buffer`` or ``input``.
    """

    inputs: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    @staticmethod
    def of(sources: Sequence[str]) -> Names:
        """The names that the compiler's paths to the inputs come to."""
        return Names(tuple(map(path_of, sources)), tuple(map(_kind, sources)))

    def of_input(self, node: Node) -> tuple[str, str]:
        """Name and kind of an input of the joint graph."""
        k = position_of(input_of(node))
        if k is None or k >= len(self.inputs):
            return str(node.target), "input"
        return self.inputs[k] or str(node.target), self.kinds[k]

    def of_gradient(self, description: Any) -> str:
        """Name of the gradient that an output of the backward is; "" where it is none."""
        k = position_of(gradient_of(description))
        return f"{self.inputs[k]}.grad" if k is not None and k < len(self.inputs) and self.inputs[k] else ""


def path_of(source: str) -> str:
    """What a user calls a thing, given the compiler's path to it.

    Example:
        >>> path_of("L['self']._modules['blocks']._modules['0']._parameters['weight']")
        'blocks.0.weight'
        >>> path_of("L['x']")
        'x'
        >>> path_of("L['args'][0]")
        'args.0'
    """
    root = _ROOT.match(source)
    parts = [next(filter(None, m.groups()), "") for m in _PART.finditer(source[root.end() if root else 0 :])]
    parts = [part for part in parts if part not in _WRAPPING and not part.startswith("__")]
    if root and root.group(1) == "args":  # of a function of ours that hands on what it is given
        parts.insert(0, "args")
    return ".".join(parts) or (root.group(1) if root else source)


def module_of(node: Node) -> str:
    """Path of the module whose forward has run a node, or whose backward it is; "" outside of modules."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    inner = list(stack.values())[-1:] if isinstance(stack, Mapping) else []
    return path_of(inner[0][0]) if inner and _is_inside(inner[0][0]) else ""


def line_of(node: Node) -> str:
    """``file:line`` of the user's code that has run a node."""
    stack = node.meta.get("stack_trace") or ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', stack)
    theirs = [(file, n) for file, n in lines if not file.startswith((_LIBRARY, *_OWN))]
    return ":".join(theirs[-1]) if theirs else ""


def _is_inside(source: str) -> bool:
    """Whether a path leads to a module below the one that is compiled."""
    root = _ROOT.match(source)
    rest = source[root.end() :] if root else source
    return any(next(filter(None, m.groups()), "") not in _WRAPPING for m in _PART.finditer(rest))


def _kind(source: str) -> str:
    if "._parameters[" in source:
        return "parameter"
    return "buffer" if "._buffers[" in source else "input"


def reason_of_break(reason: Any) -> str:
    """Why and where the compiler has broken a graph, as a sentence."""
    frames = getattr(reason, "user_stack", None) or ()
    last = [f for f in frames if isinstance(f, traceback.FrameSummary)][-1:]
    where = f" at {last[0].filename}:{last[0].lineno}" if last else ""
    text = str(getattr(reason, "reason", reason)).strip().splitlines()
    return f"{text[0] if text else 'a graph break'}{where}"
