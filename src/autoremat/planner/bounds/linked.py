"""Lower bounds where values may be moved over a link.

At the moment when op ``t`` runs for the first time, what is away has been sent before and comes back after. So it is no
more than what the link carries in the seconds before, and no more than what it carries in the seconds after: those of
the program's own ops, and of all extra seconds ``x`` of the schedule (reruns and waiting). Whatever is neither in
memory nor away is made again, which costs at least what it costs with that much more memory: a bound ``g(x)`` by the
cut of ``bounds``, which falls as ``x`` grows. Every schedule has ``x >= g(x)``; so the point where both are equal is a
lower bound.
"""

from __future__ import annotations

from math import inf
from typing import Final

from autoremat.planner import clock
from autoremat.planner.bounds.bounds import _as_share, _moments, _own_bytes, bound_at
from autoremat.program import Program

_HALVINGS: Final = 12
_MOMENTS: Final = 4


def linked_bound(program: Program, budget_bytes: int, *, deadline: float = inf) -> float:
    """A fraction of the program's seconds below which the overhead of no schedule within the budget can be.

    Args:
        program: with a link.
        budget_bytes: of the peak.
        deadline: on ``clock.worked``, where to stop with what is known.
    """
    if program.seconds <= 0 or not program.ops:
        return 0.0
    best = 0.0
    for t in _moments(program)[: _MOMENTS if len(program.ops) > _MOMENTS else None]:
        if clock.is_over(deadline):
            break
        best = max(best, bound_with_link_at(program, t, budget_bytes, above=best, deadline=deadline))
    return _as_share(program, best)


def bound_with_link_at(
    program: Program, t: int, budget_bytes: int, *, above: float = 0.0, deadline: float = inf
) -> float:
    """Seconds that any schedule within the budget takes beyond the program's, because of what fits when op ``t`` runs.

    Args:
        program: with a link.
        t: the op.
        budget_bytes: of the peak.
        above: a bound that is known; a smaller one is of no use.
        deadline: on ``clock.worked``.
    """

    def needed(extra: float) -> float:
        return bound_at(program, t, budget_bytes + away_bytes(program, t, extra), deadline=deadline)

    low, high = above, needed(above)
    if high <= low:
        return 0.0
    for _ in range(_HALVINGS):
        if clock.is_over(deadline):
            break
        middle = (low + high) / 2
        if needed(middle) >= middle:
            low = middle
        else:
            high = middle
    return low


def away_bytes(program: Program, t: int, extra_seconds: float) -> int:
    """The most bytes that can be away when op ``t`` runs first, in a schedule with so many extra seconds."""
    link = program.link
    assert link is not None
    before = sum(op.seconds for op in program.ops[:t]) + extra_seconds
    after = sum(op.seconds for op in program.ops[t + 1 :]) + extra_seconds
    most = min(link.out_bytes_per_second * before, link.in_bytes_per_second * after)
    most = min(most, inf if link.tier_bytes is None else link.tier_bytes, sum(v.nbytes for v in program.values))
    return int(most) + 1  # seconds are sums of fractions


def linked_floor_bound(program: Program) -> int:
    """Bytes below which the peak of no schedule can be, even with a tier without limit. O(reads)."""
    needed, hold = [0], program.hold
    held = [0] * (len(program.ops) + 1)
    for v, producer in enumerate(program.producer):
        if hold[v] > producer >= 0:
            held[producer + 1] += program.values[v].nbytes
            held[hold[v] + 1 if hold[v] < len(program.ops) else -1] -= program.values[v].nbytes
    there, until = 0, list(hold)
    for t in range(len(program.ops)):
        there += held[t]
        needed.append(there + _own_bytes(program, t, until))
    return program.fixed_bytes + max(needed)
