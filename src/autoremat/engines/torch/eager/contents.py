"""Computes checksums of the memory behind tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import fingerprint, storage_of


def content_of(tensor: Tensor) -> int:
    """Return a checksum of a tensor's memory; 0 if it is unseen."""
    storage = storage_of(local_of(tensor))
    return 0 if storage is None else fingerprint(storage)


def contents_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return checksums of the memory of some tensors."""
    return [content_of(t) for t in tensors]
