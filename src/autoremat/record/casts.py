"""Autocast keeps the casts of weights until its outermost region ends; forwards in one region share them.

A backward through two such forwards adds up the gradient of a weight in the low precision. So a recording between them
must not clear the cache. Torch does not tell what is in it; a mark of ours in the cache tells that a call came before.
"""

from __future__ import annotations

import weakref

import torch

_MARKS: dict[str, tuple[torch.Tensor, weakref.ref[torch.UntypedStorage]]] = {}
"""For each device a weight without elements, and its cast."""


def mark_casts() -> None:
    """From now on, until the outermost autocast region ends, casts are in use."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled() and not casts_in_use():
            weight = torch.empty(0, 0, device=device, requires_grad=True)
            with torch.enable_grad():
                cast = (weight @ weight).grad_fn._saved_self  # type: ignore[union-attr]
            _MARKS[device] = weight, weakref.ref(cast.untyped_storage())


def casts_in_use() -> bool:
    """Whether a call came before in this autocast region, whose casts plain training would use again."""
    return any(cast() is not None for _, cast in _MARKS.values())


def forget_casts() -> None:
    """Clear the cache after a recording, unless a call that came before needs it."""
    if not casts_in_use():
        torch.clear_autocast_cache()
