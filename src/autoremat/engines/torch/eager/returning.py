"""Brings back what a first step's plan keeps.

By the end of the forward, the online policy has kept other values than the plan would have. Before the backward begins,
calls are rerun. Reruns of calls in the forward's order are that part of the forward once more, with
what the plan keeps, so they take no more than the plan's forward does if nothing else is there. What comes later in the
forward goes first, where there is too little room, and comes back in a second round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.room import Room

_ROUNDS = 2


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

        def may_run(call: int, needed: Collection[int], dropped: list[int] = dropped) -> bool:
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
