"""Tells which value a tensor of the real step looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from autoremat.engines.torch.eager.witness import Witness
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import ValueMap, storage_of

OWN: int = 1 << 40
"""Numbers from here on are given where no recording gives them."""


class Numbers(ValueMap):
    """Numbers a real step's storages; in a first step as recorded.

    Args:
        witness: records the step; where it does not, numbers are given here.
    """

    def __init__(self, witness: Witness) -> None:
        super().__init__()
        self.made = OWN
        self._witness = witness

    # ---- looking -------------------------------------------------------------------------------------------------

    def known(self, storage: torch.UntypedStorage) -> int | None:
        """Return the number of a storage; None if it is not known."""
        return self._known.get(storage._cdata)

    def known_tensor(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's value; None if unknown or unseen."""
        storage = storage_of(local_of(tensor))
        return None if storage is None else self._known.get(storage._cdata)

    def agrees(self, tensor: Tensor, number: int) -> bool:
        """Tell whether a tensor's value has this number.

        A value without a number gets it.
        """
        storage = storage_of(local_of(tensor))
        if storage is None:
            return True
        address = storage._cdata
        known = self._known.get(address)
        if known is None:
            self._weak_references.append(storage._weak_ref())
            self._known[address] = number
        return known is None or known == number

    # ---- in a step that is noted -----------------------------------------------------------------------------------

    def of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's value, in a noted step.

        It is negative for a value from outside, and None if the value cannot be seen.
        """
        storage = storage_of(local_of(tensor))
        if storage is None:
            return None
        known = self._known.get(storage._cdata)
        if self._witness.shadow is None:
            return self.bind_outside(storage) if known is None else known
        recorded = self._witness.number(tensor)
        if known is None and recorded is not None:
            self.rebind(storage, recorded)
            return recorded
        if recorded is not None and recorded != known:  # the tensor was given other memory, out of sight
            recorded = self._witness.number_anew(tensor)
        if recorded is not None and recorded < 0 <= (known or 0):
            self._witness.revive(tensor, known or 0)
        elif recorded is not None and recorded != known:
            self._witness.give_up(RuntimeError("the memory of a tensor was exchanged out of sight"))
        return self.number(storage) if known is None else known

    def of_new(self, tensor: Tensor, pack: int | None = None) -> int | None:
        """Return the number of a value that a call just made.

        None if it was there before, or cannot be seen.

        Args:
            tensor: that views it.
            pack: the number of its pack, if it was saved inside the call.
        """
        storage = storage_of(local_of(tensor))
        if storage is None or self.known(storage) is not None:
            return None
        if self._witness.shadow is None:
            return self.bind_made(storage)
        number = self._witness.number(tensor) if pack is None else self._witness.number_of_pack(pack)
        if number is None:
            number = self.bind_outside(storage)
        self.rebind(storage, number)
        return number if number >= 0 else None  # a constant, such as torch.tensor makes

    def of_nobody(self) -> int:
        """Return a number that no storage has."""
        self.made += 1
        return self.made - 1

    def after_write(self, tensor: Tensor, old: int) -> int:
        """Return the number of the value that an overwritten memory holds."""
        storage = storage_of(local_of(tensor))
        assert storage is not None
        number = self._witness.number(tensor)
        if number is None:
            return self.bind_made(storage)
        self.rebind(storage, number)
        return number if number >= 0 else old  # a negative number: the recording takes the value for one from outside

    def rebind_tensor(self, tensor: Tensor, number: int) -> None:
        """Let the memory of a tensor hold the value of this number."""
        storage = storage_of(local_of(tensor))
        if storage is not None:
            self._bind(storage, number)
