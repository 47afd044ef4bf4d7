"""Which tier a user asks for: ``disk:/path``, ``host`` or ``auto``."""

from __future__ import annotations

import tempfile
from typing import Any, Final

import torch

from autoremat.engines.torch.world.tier import Disk
from autoremat.program import Link
from autoremat.program.units import Budget

_DISK: Final = "disk"
_HOST: Final = "host"


def tier_bytes(offload_budget: int | str | None) -> int | None:
    """Read the most bytes in the tier; zero means none.

    None is no limit.

    Raises:
        ValueError: a share, or what is no number of bytes.
    """
    if offload_budget is None or offload_budget == 0:
        return None if offload_budget is None else 0
    budget = Budget.read(offload_budget)
    if budget.share is not None or budget.is_auto:
        raise ValueError(f'offload_budget is a number of bytes, such as "64GiB" or 0, not {offload_budget!r}')
    return budget.in_bytes(0)


class TierOf:
    """Opens the tier of a name when it is first needed.

    Args:
        name: as users give it; None for no tier.
        offload_budget: the most bytes there.

    Attributes:
        name: ``disk:/path`` or ``host``; "" where there is no tier.
        asked: what makes the same one again.

    Raises:
        ValueError: a name that is none, or a malformed budget.
    """

    def __init__(self, name: str | None, offload_budget: int | str | None) -> None:
        kind = (name or _DISK).partition(":")[0]
        if kind not in (_DISK, _HOST, "auto"):
            raise ValueError(f'offload is None, "auto", "host" or "disk:/path", not {name!r}')
        if name is None and offload_budget is not None:
            raise ValueError('offload_budget is for offload="auto", "host" or "disk:/path", which is not given')
        if kind == "auto":
            name = _HOST if torch.cuda.is_available() else _DISK
        self.name = f"{_DISK}:{tempfile.gettempdir()}" if name == _DISK else name or ""
        self.asked = self.name or None, offload_budget
        self._most_bytes = tier_bytes(offload_budget)
        self._tier: Any = None

    def link(self) -> Link:
        """Measure the way there, once."""
        link: Link = self._opened().link()
        return link

    def open(self, nbytes: int) -> Any:
        """Open one step's part of it."""
        return self._opened().open(nbytes)

    def _opened(self) -> Any:
        if self._tier is None:
            if self.name == _HOST:
                from autoremat.engines.torch.world.pinned import Pinned

                self._tier = Pinned(self._most_bytes)
            else:
                self._tier = Disk(self.name.partition(":")[2], self._most_bytes)
        return self._tier
