"""Families: inputs of one form, which share plans.

A plan made for one input serves every one that is no larger.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from autoremat.engines.torch.eager.inputs import Sizes
from autoremat.engines.torch.eager.kinds import Kind, Prepared
from autoremat.engines.torch.eager.paying import lost_seconds, shares_of_interest
from autoremat.planner import clock

MAX_GUESTS: Final = 256
"""Sizes of inputs without their own plan that are remembered."""
_STRANGERS: Final = 3
"""After this many strangers, sizes are taken to decide the calls.

A stranger is a size that made other calls than the plan for larger ones.
"""
_PAYS: Final = 1.0
"""Losses, per cost of a plan, after which smaller inputs get one."""
_FORESEEN_PAYS: Final = 0.25
"""The same, where the smaller inputs need no recording.

Such a plan is soon made, and estimates of what is lost are low: small operators take longer than measured.
"""
_LEAST_SECONDS: Final = 0.05
"""What a plan takes at least, with or without a recording."""
_RUNGS: Final = 6
"""Plans for inputs of one form."""
_ALIKE: Final = 2
"""After this many like recordings, whole numbers are taken for irrelevant.

Their whole numbers were different.
"""
_GROWTH: Final = (2.0, 1.5, 1.25, 1.1)
"""Growth factors to try for a plan ahead of growing sizes.

The first one is taken for which a plan is within the budget.
"""

Foreseen = Callable[[Prepared, Prepared, float, float], Prepared | None]
"""Plans for other sizes than two recordings have: by how much these differ, and by how much those do."""


@dataclass
class Foreseeing:
    """Two recordings of the same calls, which tell what other sizes take.

    Attributes:
        small: the smaller one.
        large: the larger one.
        plan_seconds: what a plan for other sizes takes.
        lost_seconds: what guests lost under a host's plan, by host and share of its sizes.
    """

    small: Kind
    large: Kind
    plan_seconds: float
    lost_seconds: dict[tuple[Sizes, float], float] = field(default_factory=dict)

    def pays(self, host: Sizes, share: float, seconds: float) -> bool:
        """Note a guest's loss; tell whether a plan for such sizes pays."""
        lost = self.lost_seconds.get((host, share), 0.0) + seconds
        self.lost_seconds[host, share] = 0.0 if (pays := lost > _FORESEEN_PAYS * self.plan_seconds) else lost
        return pays


@dataclass
class Family:
    """What is known of the inputs of one form.

    A kind whose sizes fit into those of another one is a *guest* of that one, its *host*: it goes by the host's plan.
    """

    _kinds: OrderedDict[Sizes, Kind] = field(default_factory=OrderedDict)
    _guests: OrderedDict[Sizes, Kind] = field(default_factory=OrderedDict)
    _strangers: int = 0
    """Guests that had to be recorded after all."""
    _numbers_matter: bool = True
    """Whole numbers among the arguments may be sizes of something."""
    _lost_seconds: dict[tuple[Sizes, int], float] = field(default_factory=dict)
    """Seconds that guests lost under a host's plan.

    By host, and by how much smaller they are.
    """
    _foreseeing: Foreseeing | None = None
    """Tells what smaller inputs take, once there are two recordings of the same calls."""

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, kind: Kind) -> bool:
        return self._kinds.get(kind.sizes) is kind

    def kinds(self) -> list[Kind]:
        """List the kinds with plans of their own."""
        return list(self._kinds.values())

    def find(self, sizes: Sizes) -> Kind | None:
        """Return the kind of an input of these sizes, if known.

        It is one with its own plan, or a guest of a larger one.
        """
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

    def foresees_smaller(self, guest: Kind, foreseen: Foreseen) -> bool:
        """Plan for smaller inputs, from recordings of larger ones, where that pays.

        Tell whether there is a new plan by which the guest may go.
        """
        known, host = self._foreseeing, self._host(guest.sizes)
        if known is None or host is None or guest in self or len(self._kinds) >= _RUNGS:
            return False
        share = guest.sizes.share_of(host.sizes)
        level = next((s for s in shares_of_interest(host.plan) if share <= s), None)
        if level is None or not known.pays(host.sizes, level, lost_seconds(host.plan, host.script, share)):
            return False
        further = level * host.sizes.elements / known.large.sizes.elements
        sizes = known.large.sizes.shrunk(known.small.sizes, further)
        if not guest.sizes.fits_into(sizes):
            return False
        between = known.small.sizes.ratio(known.large.sizes)
        prepared = foreseen(known.small.prepared, known.large.prepared, between, further)
        if prepared is not None:
            self._kinds[sizes] = Kind(prepared, sizes)
        return prepared is not None

    def relative(self, sizes: Sizes) -> Kind | None:
        """Return the kind whose plan lacks only the existing gradients."""
        if self._strangers >= _STRANGERS or self._host(self._known_as(sizes)) is not None:
            return None
        sizes = self._known_as(sizes)
        found = [k for k in self._kinds.values() if k.serves_but_for_gradients(sizes)]
        return min(found, key=lambda k: k.sizes.elements, default=None)

    def add(self, kind: Kind) -> None:
        """Add a kind that is to be recorded."""
        kind.sizes = self._known_as(kind.sizes)
        guest = self._guests.pop(kind.sizes, None)
        self._strangers += guest is not None and guest.stale
        self._kinds[kind.sizes] = kind

    def newcomer(self, sizes: Sizes) -> Sizes | None:
        """Return what tells apart inputs that no plan serves.

        None, unless their sizes decide which calls are made.
        """
        return self._known_as(sizes) if self._strangers >= _STRANGERS else None

    def largest(self) -> Kind | None:
        """Return the largest kind with a plan."""
        return max((k for k in self._kinds.values() if k.script), key=lambda k: k.sizes.elements, default=None)

    def recorded(self, kind: Kind, foreseen: Foreseen) -> None:
        """Note a kind's first plan; where sizes grow, plan ahead."""
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
            begin, sizes = clock.now(), kind.sizes.grown(before.sizes, factor)
            prepared = foreseen(before.prepared, kind.prepared, before.sizes.ratio(kind.sizes), factor)
            if prepared is not None:
                self._kinds[sizes] = Kind(prepared, sizes)
                self._foreseeing = Foreseeing(before, kind, max(_LEAST_SECONDS, clock.now() - begin))
                return

    def forget(self) -> None:
        """Forget the kind that was used least recently."""
        self._kinds.popitem(last=False)

    def _known_as(self, sizes: Sizes) -> Sizes:
        return sizes if self._numbers_matter else sizes.without_numbers()

    def _forget_numbers(self) -> None:
        """Merge inputs that differ in whole numbers only.

        The numbers have turned out to be sizes of nothing.
        """
        self._numbers_matter = False
        kinds, self._kinds, self._guests = self._kinds, OrderedDict(), OrderedDict()
        for kind in kinds.values():
            kind.sizes = kind.sizes.without_numbers()
            self._kinds[kind.sizes] = kind

    def _host(self, sizes: Sizes) -> Kind | None:
        """Return the kind with the smallest plan that serves these sizes."""
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
        """Tell whether such inputs lost more than their own plan costs."""
        share = sizes.share_of(host.sizes)
        rung, lost = (host.sizes, int(-math.log2(share))), lost_seconds(host.plan, host.script, share)
        total = self._lost_seconds[rung] = self._lost_seconds.get(rung, 0.0) + lost
        if len(self._kinds) >= _RUNGS or total <= _PAYS * max(_LEAST_SECONDS, host.prepared.cost_seconds):
            return False
        self._lost_seconds[rung] = 0.0
        return True


def _is_smaller_but_for_numbers(kind: Kind, other: Kind) -> bool:
    """Tell whether an input fits into another except for whole numbers."""
    if kind.sizes.fits_into(other.sizes):
        return False
    return kind.sizes.without_numbers().fits_into(other.sizes.without_numbers())
