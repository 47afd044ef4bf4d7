"""Which value a tensor of the real step looks at: storages, their versions and their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from autoremat.record.local import is_distributed, local_of
from autoremat.record.values import ValueMap, storage_of

OWN: int = 1 << 40
"""Numbers from here on are given where no recording gives them."""


class Values(ValueMap):
    """Numbers of the storages of a real step; a storage may be asked for without becoming known."""

    def __init__(self) -> None:
        super().__init__()
        self.made = OWN

    def known(self, storage: torch.UntypedStorage) -> int | None:
        """The number of a storage; None if it is not known."""
        return self._known.get(storage._cdata)

    def known_tensor(self, tensor: Tensor) -> int | None:
        """The number of the value that a tensor looks at; None if it is not known, or cannot be seen."""
        storage = storage_of(local_of(tensor) if is_distributed(tensor) else tensor)
        return None if storage is None else self._known.get(storage._cdata)

    def rebind_tensor(self, tensor: Tensor, number: int) -> None:
        """Let the memory of a tensor hold the value of this number."""
        storage = storage_of(local_of(tensor))
        if storage is not None:
            self._bind(storage, number)
