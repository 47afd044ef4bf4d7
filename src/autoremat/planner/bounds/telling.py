"""Moments that tell most: at which the linear program of ``stages`` is to look next.

What it costs grows fast with the number of moments, and moments at which memory does not bind say nothing. So the
first ones are the fullest of equal parts of what the plain program has too much. An optimum of the linear program then
says what would be in memory at every other moment; those at which that is too much are looked at, too, and those at
which there is room no more.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from autoremat.planner.bounds.stages import ZERO, Floats, Stages
from autoremat.program import Program, simulate

_LATE = 0.5
"""How much of what is made again within a stage counts as gone all along it, where that is more than there is room."""

_ROOM = 1e-6
"""The share of the budget that has to be left at a moment of which nothing more is to be expected."""


def fullest(program: Program, budget_bytes: int, count: int) -> list[int]:
    """The fullest moment of each of so many parts of the program; a part is short where much is above the budget."""
    full = simulate(program).resident_bytes
    above = [t for t, nbytes in enumerate(full) if nbytes > budget_bytes]
    sums = np.cumsum([0.0, *(float(full[t] - budget_bytes) ** 0.5 for t in above)])
    edges = np.searchsorted(sums, [sums[-1] * k / count for k in range(count)]).tolist()
    return [above[max(range(a, b), key=lambda k: full[above[k]])] for a, b in pairwise([*edges, len(above)]) if a < b]


class Telling:
    """The moments of one program and budget, from one optimum to the next.

    Args:
        program: the step.
        budget_bytes: of the peak.
        count: of moments at first.

    Attributes:
        program, budget_bytes: the same.
        moments: ascending.
    """

    def __init__(self, program: Program, budget_bytes: int, count: int) -> None:
        self.program, self.budget_bytes = program, budget_bytes
        self.moments = fullest(program, budget_bytes, count)
        self._left: set[int] = set()
        """Moments that have been given up once: that they come back shows that they should not."""

    def go_on(self, stages: Stages, point: Floats, more: int, *, gives_up: bool = True) -> bool:
        """Add up to so many moments by an optimum, give up those with room; whether any has been added.

        A point of whole numbers has room nearly everywhere, which tells nothing: there none is given up.
        """
        here, mild = (bytes_along(stages, point, share) - self.budget_bytes for share in (1.0, _LATE))
        found: list[tuple[float, float, int]] = []
        for w, end in enumerate(stages.moments):
            between = [t for t in range(stages.first(w), end) if mild[t] > 0]
            if between:
                found.append(max((max(here[t], 0.0), mild[t], t) for t in between))
        added = {t for _, _, t in sorted(found, reverse=True)[:more]}
        idle = {t for t in self.moments if gives_up and here[t] < -_ROOM * self.budget_bytes} - self._left
        self._left |= idle
        self.moments = sorted(added.union(self.moments) - idle)
        return bool(added)


def bytes_along(stages: Stages, point: Floats, share: float = 1.0) -> Floats:
    """The least bytes at the first run of every op, as a point has it.

    What is made again in a stage may be away all along it, if that suits one moment; ``share`` of it counts as away.
    """
    program, n = stages.program, len(stages.program.ops)
    steps = np.zeros(n + 1)
    for w, end in enumerate(stages.moments):
        begin = stages.first(w)
        for v, made_by in enumerate(program.producer):
            if 0 <= made_by <= end:
                made = share * float(point[stages.again.get((w, made_by), ZERO)])
                is_last = w + 1 == len(stages.moments)
                carried = float(program.hold[v] >= end) if is_last else float(point[stages.at(w + 1, v)])
                amounts = _amounts(program, v, max(begin, made_by), end, made, carried)
                for t, amount in amounts:
                    steps[t] += amount * program.values[v].nbytes
    return np.asarray(program.fixed_bytes + np.cumsum(steps)[:n])


def _amounts(program: Program, v: int, begin: int, end: int, made: float, carried: float) -> list[tuple[int, float]]:
    """By how much of itself a value is in memory more, or less, from which op on, within a stage."""
    stays = max(0.0, carried - made)
    uses = [i for i in (program.producer[v], *program.readers[v]) if begin <= i <= end]
    for_uses = max(stays, 1.0 - made) if uses else stays
    until = max(uses, default=begin - 1)
    found = [(begin, for_uses), (until + 1, stays - for_uses), (end + 1, -stays)]
    for i in dict.fromkeys(uses):
        found += [(i, 1.0 - for_uses), (i + 1, for_uses - 1.0)]
    if until < end:
        found += [(end, carried - stays), (end + 1, stays - carried)]
    return found
