"""Brings back what the plan of a first step keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection

from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.room import Room


def sweep(ledger: Ledger, gone: Collection[int], stays: Callable[[int], bool], room: Room | None) -> None:
    """Recompute what is gone, as far as there is room: O(calls).

    Each call is rerun once. Where a call does not fit, all that does not need it comes one by one; the rest when it is
    asked for.

    Args:
        ledger: of the forward.
        gone: values.
        stays: whether another value that was made on the way stays in memory.
        room: that there is; None: any.
    """
    refused: set[int] = set()

    def may_run(call: int) -> bool:
        fits = room is None or room.fits(call)
        refused.update(() if fits else (call,))
        return fits

    for values in [gone, *([v] for v in sorted(gone, key=ledger.maker.__getitem__))]:
        if refused.isdisjoint(ledger.missing(values)):
            ledger.recompute(values, stays, lambda locked: None, may_run)
