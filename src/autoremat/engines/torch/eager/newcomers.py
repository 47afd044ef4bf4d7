"""Newcomers: decides which new kinds of input are recorded.

A recording takes as long as several steps, and pays if its kind comes back. Nobody knows that beforehand. So the first
few new kinds are recorded at once. Where more of them come, a kind is recorded once its steps have taken as long as its
recording will, or have come often; until then they run under the online policy. So recordings never take much longer
than the steps do, and few of them are in vain.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from autoremat.engines.torch.eager.inputs import Form, Sizes

AT_ONCE: Final = 8
"""This many new kinds are recorded when they first come."""
OFTEN: Final = 10
"""A kind that has come this often is recorded in any case."""
_EARNED: Final = 0.01
"""Share of an immediate recording earned by each planned step."""
_MAX_MET: Final = 1024
"""Kinds without a recording that are remembered."""


@dataclass
class _Met:
    """An unrecorded kind: how often it came, and its forwards' seconds."""

    times: int = 0
    seconds: float = 0.0


class Newcomers:
    """Decides which kinds are recorded.

    Attributes:
        recorded: form and sizes of the kinds that were recorded last.
        denied: how many steps of kinds without a recording there have been.
    """

    def __init__(self) -> None:
        self._credit, self._cost_seconds = float(AT_ONCE), 0.0
        self._met: OrderedDict[int, _Met] = OrderedDict()
        self.recorded: list[tuple[Form, Sizes]] = []
        self.denied = 0

    def may_record(self, key: Hashable) -> bool:
        """Tell whether the present step, of an unplanned kind, is recorded.

        ``key``: what tells it from other kinds.
        """
        number = hash(key)
        met = self._met.setdefault(number, _Met())
        self._met.move_to_end(number)
        met.times += 1
        is_paid = met.times >= OFTEN or met.seconds > self._cost_seconds
        if not is_paid and self._credit < 1:
            self.denied += 1
            if len(self._met) > _MAX_MET:
                self._met.popitem(last=False)
            return False
        if not is_paid:
            self._credit -= 1
        del self._met[number]
        return True

    def has_recorded(self, form: Form, sizes: Sizes, seconds: float) -> None:
        """Note that a kind has been recorded, and how long that took."""
        self._cost_seconds = seconds
        self.recorded = [*self.recorded[1 - AT_ONCE :], (form, sizes)]

    def has_noted(self, key: Hashable, seconds: float) -> None:
        """Note how long a forward of an unrecorded kind took."""
        met = self._met.get(hash(key))
        if met is not None:
            met.seconds += seconds

    def has_followed(self) -> None:
        """Note that a step goes by a plan."""
        self._credit = min(AT_ONCE, self._credit + _EARNED)
