"""Values moved at random, wherever and whenever they may."""

from __future__ import annotations

import random
from dataclasses import replace

from autoremat.planner.search.moving import Gap, gaps, places
from autoremat.program import Offload, Program, Schedule


def with_random_offloads(program: Program, schedule: Schedule, dice: random.Random) -> Schedule:
    """The schedule with most of what may move moved, at any moments."""
    where, found = places(program, schedule), list[Offload]()
    for gap in gaps(program, schedule, where):
        if dice.random() < 0.7:
            found.append(_somewhere_in(gap, where, dice))
    return replace(schedule, offloads=tuple(sorted(found, key=lambda o: o.send)))


def _somewhere_in(gap: Gap, where: list[int], dice: random.Random) -> Offload:
    """An offload with its four events anywhere in a gap; it may be sent ahead of that."""
    inside = [p for p in where if gap.begin <= p <= gap.end]
    gone = dice.randrange(len(inside) - 1)
    fetch = dice.randrange(gone + 1, len(inside))
    send, here = dice.choice([p for p in where if gap.ready <= p <= inside[gone]]), dice.randrange(fetch, len(inside))
    return Offload(gap.value, send - 1, inside[gone] - 1, inside[fetch], inside[here])
