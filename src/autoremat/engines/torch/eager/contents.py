"""What is in memory, told apart by a number."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from autoremat.record.values import fingerprint


def checksum(memory: Iterable[torch.UntypedStorage]) -> int:
    """A number that tells the contents of some memory apart."""
    total = 0
    for storage in memory:
        total = zlib.crc32(fingerprint(storage).to_bytes(8, "little"), total)
    return total
