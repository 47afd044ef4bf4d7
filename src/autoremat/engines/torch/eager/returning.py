"""Brings back what a first step's plan keeps.

By the end of the forward, the online policy has kept other values than the plan would have. Before the backward begins,
calls are rerun. Reruns of calls in the forward's order are that part of the forward once more, with
what the plan keeps, so they take no more than the plan's forward does if nothing else is there. What comes later in the
forward goes first, where there is too little room, and comes back in a second round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping

from torch import Tensor

from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.needs import Needs
from autoremat.engines.torch.eager.room import Room
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.operators.local import local_of

_ROUNDS = 2


def begin_by(
    script: Script, ledger: Ledger, needs: Needs, can_go: Callable[[int], bool], there: Mapping[int, Tensor],
    room: Room | None,
) -> None:  # fmt: skip
    """Hold what a plan keeps, and drop the rest.

    Args:
        script: of the plan.
        ledger: of the forward.
        needs: what the backward needs.
        can_go: whether dropping a held value frees its memory and loses nothing.
        there: values that somebody else holds; nobody has to recompute these now.
        room: what may be taken; None: anything.
    """
    for entry in ledger.entries.values():  # also of calls that the plan never reruns: they may be needed
        entry.stops = frozenset([v for _, v in entry.saved if v in script.stops])
    kept = script.at_end
    for value in list(ledger.held):
        if value not in kept and value in ledger.maker and can_go(value):
            ledger.let_go(value)
    for value in (kept & there.keys()) - ledger.held.keys():
        ledger.hold(value, local_of(there[value]).detach())
    ledger.finish_forward()
    gone = [v for v in kept - script.away if v not in ledger.held and v in ledger.maker and needs.is_needed(v)]
    if not ledger.can_make(ledger.missing(gone)):
        return  # it comes when it is asked for
    if room is not None:
        room.learn(script.costs)
    lent = [v for v in there if v in ledger.maker and v not in ledger.held]
    for value in lent:  # only until the user goes on, who may overwrite them
        ledger.hold(value, local_of(there[value]).detach())
    bring_back(ledger, kept - script.away, gone, can_go, room)
    for value in lent:
        ledger.let_go(value)
    ledger.recomputed -= kept  # these replace the forward's own values


def bring_back(
    ledger: Ledger, kept: Collection[int], gone: Collection[int], can_go: Callable[[int], bool], room: Room | None
) -> None:  # fmt: skip
    """Recompute values that are gone, as far as there is room: O(calls).

    Args:
        ledger: of the forward.
        kept: what the plan keeps.
        gone: those of them that are to come back; where there is no room, they come when they are asked for.
        can_go: whether dropping a held value frees its memory and loses nothing.
        room: what may be taken; None: anything.
    """
    for _ in range(_ROUNDS):
        dropped: list[int] = []

        def may_run(call: int, needed: Container[int], dropped: list[int] = dropped) -> bool:
            if room is None or room.fits(call):
                return True
            later = {ledger.maker[v]: v for v in ledger.held if v in kept and ledger.maker.get(v, -1) > call}
            for _, value in sorted(later.items(), reverse=True):
                if value not in needed and can_go(value):
                    ledger.let_go(value)
                    dropped.append(value)
                    if room.fits(call):
                        return True
            return False

        ledger.recompute(gone, kept.__contains__, lambda locked: None, may_run)
        gone = [*dropped, *(v for v in gone if v not in ledger.held)]
