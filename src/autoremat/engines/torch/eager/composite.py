"""Composites: torch functions made of other calls, heard as one.

That is possible where the plan has nothing to do at any of their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import le
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from autoremat.engines.torch.eager.path import n_elements
from autoremat.engines.torch.eager.state import State

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.script import Work

_PLAIN: Final = (type(None), bool, int, float, str)
_TENSORS: Final = (Tensor, nn.Parameter)
_OTHER: Final = object()
"""Stands for what cannot be compared without running foreign code."""


@dataclass(frozen=True, slots=True)
class Composite:
    """A function that was looked into while its path was recorded.

    Given the same in the same state, it makes the same calls: torch's functions depend on nothing else. So its calls
    need not be heard one by one, as long as there is nothing to do at any of them.

    Attributes:
        func: that was called.
        begin: number of the first call in it.
        end: number of the first call after it.
        given: its arguments; of tensors the kind.
        sizes: of the tensors.
        state: in which it was called.
        numel: how many elements it gave.
        random: whether a call in it draws from a generator.
    """

    func: Callable[..., Any]
    begin: int
    end: int
    given: tuple[Any, ...]
    sizes: tuple[torch.Size, ...]
    state: State
    numel: int
    random: bool = False

    def is_met_by(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a call is the recorded one, on no larger tensors."""
        if func is not self.func:
            return False
        given, sizes = _outline(args, kwargs)
        return given == self.given and State.now() == self.state and all(map(_fits, sizes, self.sizes))


def looked_into(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, begin: int, end: int
) -> Composite | None:
    """Describe a function that was looked into; None if not comparable."""
    given, sizes = _outline(args, kwargs)
    state = State.now()
    if end <= begin or _OTHER in given or state.has_modes_of_others:
        return None
    return Composite(func, begin, end, given, sizes, state, n_elements(out))


def untouched(composites: Sequence[Composite], works: Sequence[Work | None]) -> dict[int, Composite]:
    """Find the largest functions without work inside, by first call."""
    found: dict[int, Composite] = {}
    for composite in sorted(composites, key=lambda c: c.end):
        inside = [work for work in works[composite.begin : composite.end] if work is not None]
        if all(work.draws_only for work in inside):
            found[composite.begin] = replace(composite, random=bool(inside))
    return found


class _Kind(NamedTuple):
    """What of a tensor may decide which calls a function makes."""

    kind: type
    dtype: torch.dtype
    dim: int
    requires_grad: bool


def _outline(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[torch.Size, ...]]:
    items = (*args, *kwargs, *kwargs.values()) if kwargs else args
    return tuple(map(_seen, items)), tuple([item.shape for item in items if type(item) in _TENSORS])


def _seen(item: Any) -> Any:
    kind = type(item)
    if kind in _TENSORS:
        return _Kind(kind, item.dtype, item.dim(), item.requires_grad)
    return item if kind in _PLAIN else _OTHER


def _fits(size: torch.Size, recorded: torch.Size) -> bool:
    return size == recorded or all(map(le, size, recorded))
