"""Inputs of one form: a plan made for one serves every one that is no larger."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from autoremat.engines.torch.eager.inputs import Sizes
from autoremat.engines.torch.eager.kinds import Kind, Prepared

MAX_GUESTS: Final = 256
"""Sizes of inputs without a plan of their own that are remembered."""
_STRANGERS: Final = 3
"""So many sizes that made other calls than the plan for larger ones show that sizes decide which calls are made."""
_PAYS: Final = 1.0
"""A plan of its own is made for smaller inputs once they have lost so many times what making one takes."""
_RUNGS: Final = 6
"""Plans for inputs of one form."""
_ALIKE: Final = 2
"""So many recordings that are not different, although numbers were, show that numbers decide nothing."""
_GROWTH: Final = (2.0, 1.5, 1.25, 1.1)
"""When sizes have grown, a plan is made for sizes so much larger, if there is one within the budget."""


@dataclass
class Family:
    """What is known of the inputs of one form.

    A kind whose sizes fit into those of another one is a *guest* of that: it goes by the other's plan.
    """

    _kinds: OrderedDict[Sizes, Kind] = field(default_factory=OrderedDict)
    _guests: OrderedDict[Sizes, Kind] = field(default_factory=OrderedDict)
    _strangers: int = 0
    """Guests that had to be recorded after all."""
    _numbers_matter: bool = True
    """Whole numbers among the arguments may be sizes of something."""
    _lost_seconds: dict[tuple[Sizes, int], float] = field(default_factory=dict)
    """By host, and how much smaller they are: what its guests have lost under its plan."""

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, kind: Kind) -> bool:
        return self._kinds.get(kind.sizes) is kind

    def kinds(self) -> list[Kind]:
        """Those with plans of their own."""
        return list(self._kinds.values())

    def find(self, sizes: Sizes) -> Kind | None:
        """The kind of an input of these sizes: one of its own, a guest of a larger one, or none that is known."""
        sizes = self._known_as(sizes)
        kind = self._kinds.get(sizes)
        if kind is not None:
            self._kinds.move_to_end(sizes)
            return kind
        host = self._host(sizes)
        if host is None:
            return None
        guest = self._guest(sizes, host)
        guest.pays = self._pays(sizes, host)
        return guest

    def relative(self, sizes: Sizes) -> Kind | None:
        """The kind whose plan would serve these sizes if it knew of the gradients that are there."""
        if self._strangers >= _STRANGERS or self._host(self._known_as(sizes)) is not None:
            return None
        sizes = self._known_as(sizes)
        found = [k for k in self._kinds.values() if k.serves_but_for_gradients(sizes)]
        return min(found, key=lambda k: k.sizes.elements, default=None)

    def add(self, kind: Kind) -> None:
        """A kind that is to be recorded."""
        kind.sizes = self._known_as(kind.sizes)
        guest = self._guests.pop(kind.sizes, None)
        self._strangers += guest is not None and guest.stale
        self._kinds[kind.sizes] = kind

    def newcomer(self, sizes: Sizes) -> Sizes | None:
        """What tells inputs that no plan serves apart: nothing, unless their sizes decide which calls are made."""
        return self._known_as(sizes) if self._strangers >= _STRANGERS else None

    def largest(self) -> Kind | None:
        """The largest kind with a plan."""
        return max((k for k in self._kinds.values() if k.script), key=lambda k: k.sizes.elements, default=None)

    def recorded(self, kind: Kind, foreseen: Callable[[Prepared, Prepared, float, float], Prepared | None]) -> None:
        """A kind has its first plan. If sizes have grown, they may go on growing: have a plan for larger ones."""
        if not kind.serves(kind.sizes) or kind.prepared.is_of_the_largest:
            return
        others = [k for k in self._kinds.values() if k is not kind and k.serves(k.sizes)]
        alike = [kind.prepared.is_within(k.prepared) for k in others if _is_smaller_but_for_numbers(kind, k)]
        if len(alike) >= _ALIKE and all(alike):
            self._forget_numbers()
        smaller = [k for k in others if k.sizes.fits_into(kind.sizes)]
        if not smaller:
            return
        before = max(smaller, key=lambda k: k.sizes.elements)
        for factor in _GROWTH:
            sizes = kind.sizes.grown(before.sizes, factor)
            prepared = foreseen(before.prepared, kind.prepared, before.sizes.ratio(kind.sizes), factor)
            if prepared is not None:
                self._kinds[sizes] = Kind(prepared, sizes)
                return

    def forget(self) -> None:
        """Forget the kind that was used least recently."""
        self._kinds.popitem(last=False)

    def _known_as(self, sizes: Sizes) -> Sizes:
        return sizes if self._numbers_matter else sizes.without_numbers()

    def _forget_numbers(self) -> None:
        """Numbers are sizes of nothing: inputs that differ in them alone are of one kind."""
        self._numbers_matter = False
        kinds, self._kinds, self._guests = self._kinds, OrderedDict(), OrderedDict()
        for kind in kinds.values():
            kind.sizes = kind.sizes.without_numbers()
            self._kinds[kind.sizes] = kind

    def _host(self, sizes: Sizes) -> Kind | None:
        """The kind with the smallest plan that serves these sizes."""
        if self._strangers >= _STRANGERS:
            return None
        found = [k for k in self._kinds.values() if k.serves(sizes)]
        return min(found, key=lambda k: (k.sizes.elements, sum(k.prepared.found)), default=None)

    def _guest(self, sizes: Sizes, host: Kind) -> Kind:
        guest = self._guests.setdefault(sizes, Kind(sizes=sizes))
        self._guests.move_to_end(sizes)
        if len(self._guests) > MAX_GUESTS:
            self._guests.popitem(last=False)
        guest.prepared, guest.share = host.prepared, sizes.share_of(host.sizes)
        return guest

    def _pays(self, sizes: Sizes, host: Kind) -> bool:
        """Whether inputs of about these sizes have lost more time under the larger plan than their own one takes."""
        share = sizes.share_of(host.sizes)
        rung, lost = (host.sizes, int(-math.log2(share))), host.prepared.lost_seconds(share)
        total = self._lost_seconds[rung] = self._lost_seconds.get(rung, 0.0) + lost
        if len(self._kinds) >= _RUNGS or total <= _PAYS * host.prepared.cost_seconds:
            return False
        self._lost_seconds[rung] = 0.0
        return True


def _is_smaller_but_for_numbers(kind: Kind, other: Kind) -> bool:
    """Whether an input would fit into another one but for its whole numbers."""
    if kind.sizes.fits_into(other.sizes):
        return False
    return kind.sizes.without_numbers().fits_into(other.sizes.without_numbers())
