"""Lower bounds that hold for every schedule: on its overhead within a budget, and on its peak.

Take any point of the program, just when op ``t`` runs for the first time. What is in memory then fits into the budget,
and whatever later ops read and is not in memory must be made again from what is. Whoever may choose freely what is in
memory at that moment, pays for no other moment, and runs no op more than once more, does at least as well as any real
schedule. That relaxed choice under its one constraint on bytes is relaxed once more with a Lagrange multiplier: the
minimum cut of ``min_cut`` at price ``p``, less ``p`` times the free bytes, is a bound for every ``p >= 0``; it is
concave in ``p``, so bisection on the sign of its slope finds the best. Rounding inside the cut is always downwards.

One cut at one price ranks many moments; the best few get the bisection. Where memory is tight, one moment is not
enough: ops run again several times, and what was made again must fit at the next moment, too. So the linear program of
``stages`` looks at some moments at once. And where few large values or long ops decide, fractions of them are not
enough: at two moments or a few more, it is solved over whole numbers, as far as a short search gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Final

import numpy as np

from autoremat.planner import clock
from autoremat.planner.bounds.stages import Stages
from autoremat.planner.bounds.telling import Telling
from autoremat.planner.search.min_cut import Network, build
from autoremat.planner.search.tables import split_point
from autoremat.program import Program, simulate

_CANDIDATES: Final = 32
"""Moments that are looked at with one cut each."""

_REFINED: Final = 3
"""Moments that get the whole bisection."""

_TOGETHER: Final = 12
"""Moments of the linear program."""

_LARGEST: Final = 10_000
"""Moments times ops up to which the linear program takes less than a second."""

_LOOKED_AT: Final = 80_000
"""Moments times ops that are ranked at most, for large programs."""

_STEPS: Final = 24
"""Steps of the bisection."""

_FIRST_ALONG, _MOST_ALONG, _MOST_ALONG_SECONDS, _GROWTH = 8, 100, 20.0, 2.6
"""Moments of the linear program all along, at first and at most; the work it may take, and with which power of the
number of moments that grows."""

_LEAST_MORE, _MOST_MORE, _SURE = 1.0, 1.5, 0.8
"""How many times as many moments there are the next time, at least and at most; in what share of the work that is left
they are to fit, because a program that does not end says nothing."""

_LOOKS_EVERY: Final = 3
"""From every how manieth of them on it looks at all later ones together: that makes it much larger."""

_NEXT_ALONG: Final = 4
"""How many stages it looks at together from every one of them on."""

_LARGEST_ALONG: Final = 24_000
"""Moments times ops up to which that is worth it."""

_LARGEST_WHOLE_ALONG, _FRACTIONS_SHARE, _LOOKS_WHOLE, _MORE_WHOLE, _HARD = 150, 0.3, 3, 2, 3.0
"""Ops up to which the moments are looked at over whole numbers, too; the share of the work that is for fractions then;
how often, with how many moments more each time; how many times as much work a node is there as elsewhere."""

_LARGEST_WHOLE: Final = 2500
"""Ops up to which an integer program over two moments is worth its time."""

_WHOLE: Final = 1200
"""Moments times ops up to which it takes more than two moments."""

_SMALL_ANYWHERE: Final = 60
"""Ops up to which the telling moments get both where nothing is backward; beyond, moments all along tell more."""

_NODES: Final = 100
"""Nodes of the search for it."""

_TOLERANCE: Final = 2e-6
"""Of the integer program, as a share."""

_MOST_SECONDS: Final = 0.6
"""Time for the linear program, and for the integer program."""


def lower_bound(program: Program, budget_bytes: int, *, deadline: float = inf) -> float:
    """A fraction of the program's seconds below which the overhead of no schedule within the budget can be.

    The schedules meant are all that run every op in program order plus reruns of repeatable ops anywhere. Never
    negative; 0.0 for a program without seconds. About a hundred minimum cuts and a linear program; stops at
    ``deadline`` (on ``clock.worked``) with what it has.
    """
    best, moments = cut_bound(program, budget_bytes, deadline=deadline)
    return max(best, closer_bound(program, budget_bytes, moments, deadline=deadline))


def cut_bound(program: Program, budget_bytes: int, *, deadline: float = inf) -> tuple[float, list[int]]:
    """The part of ``lower_bound`` that minimum cuts give, and the moments looked at, the most telling first."""
    if program.seconds <= 0 or not program.ops:
        return 0.0, []
    ranked = _ranked(program, budget_bytes, deadline)
    best = max((bound for bound, _ in ranked), default=0.0)
    for _, t in ranked[:_REFINED]:
        best = max(best, bound_at(program, t, budget_bytes, deadline=deadline))
    return _as_share(program, best), [t for _, t in ranked]


def closer_bound(program: Program, budget_bytes: int, moments: list[int], *, deadline: float = inf) -> float:
    """The part of ``lower_bound`` that looks at several moments at once, about a second for a thousand ops."""
    if not moments:
        return 0.0
    is_divided, best = any(op.phase == "backward" for op in program.ops), 0.0
    if is_divided or len(program.ops) <= _SMALL_ANYWHERE:
        together = _together(program, budget_bytes, moments, deadline)
        best = max(together, _whole(program, budget_bytes, moments, deadline))
    if not is_divided:
        best = max(best, _all_along(program, budget_bytes, deadline))
    return _as_share(program, best)


def _as_share(program: Program, seconds: float) -> float:
    # The cut is exact integers divided by a float: a hair less keeps the bound below the truth.
    return float(seconds * (1 - 1e-12) / program.seconds)


def floor_bound(program: Program) -> int:
    """Bytes below which the peak of no schedule can be. O(reads).

    Whatever is done before, when an op runs for the first time there must be room for what is fixed, what is held, what
    later ops read and no op can make again, and what the op itself needs.
    """
    n = len(program.ops)
    steps = np.zeros(n + 1, dtype=np.int64)
    until = [_forced_until(program, v) for v in range(len(program.values))]
    for v, producer in enumerate(program.producer):
        if until[v] > producer >= 0:
            steps[producer + 1] += program.values[v].nbytes
            steps[until[v] + 1] -= program.values[v].nbytes
    forced = np.cumsum(steps)[:n].tolist()
    needed = [forced[t] + _own_bytes(program, t, until) for t in range(n)]
    return program.fixed_bytes + max(needed, default=0)


def _forced_until(program: Program, value: int) -> int:
    """The last op up to which every schedule has the value in memory."""
    producer, readers = program.producer[value], program.readers[value]
    lost = producer >= 0 and bool(program.ops[producer].once) and bool(readers)
    return max(program.hold[value], readers[-1] if lost else -1)


def _own_bytes(program: Program, t: int, until: list[int]) -> int:
    """What op ``t`` needs beyond what is there in any case."""
    op, values = program.ops[t], program.values
    reads = [v for v in op.reads if not values[v].fixed and until[v] < t]
    taken = sum(min(values[new].nbytes, values[old].nbytes) for new, old in op.in_place)
    return sum(values[v].nbytes for v in (*reads, *op.writes)) + op.scratch_bytes - taken


def _moments(program: Program) -> list[int]:
    """Where memory is likely to bind: the fullest op of each part of the backward and of the end of the forward."""
    n = len(program.ops)
    split = min(split_point(program), n - 1)
    begin = max(0, split - (n - split) // 4)
    full = simulate(program).resident_bytes
    count = max(6, min(_CANDIDATES, _LOOKED_AT // n))
    edges = [begin + (n - begin) * k // count for k in range(count + 1)]
    fullest = [max(range(a, b), key=full.__getitem__) for a, b in pairwise(edges) if a < b]
    return list(dict.fromkeys([int(np.argmax(full)), split, *fullest]))


def _ranked(program: Program, budget_bytes: int, deadline: float) -> list[tuple[float, int]]:
    """Moments with a bound for each, best first; the price of the first one is good enough to compare them."""
    weights, price, found = _Weights(program), 0.0, list[tuple[float, int]]()
    for t in _moments(program):
        if clock.is_over(deadline):
            break
        moment = _Moment(program, t)
        if not price:
            bound, price = _best_price(moment, weights, budget_bytes, deadline)
        else:
            bound = max(0.0, _cut_at(moment, weights, budget_bytes, price)[0])
        found.append((bound, t))
    return sorted(found, reverse=True)


def bound_at(program: Program, t: int, budget_bytes: int, *, deadline: float = inf) -> float:
    """Seconds of reruns that any schedule within the budget needs because of what fits when op ``t`` runs."""
    return _best_price(_Moment(program, t), _Weights(program), budget_bytes, deadline)[0]


class _Weights:
    """Bytes of the values and seconds of the ops as arrays."""

    def __init__(self, program: Program) -> None:
        self.seconds = np.array([op.again_seconds for op in program.ops])
        self.nbytes = np.array([float(v.nbytes) for v in program.values])


def _best_price(moment: _Moment, weights: _Weights, budget_bytes: int, deadline: float) -> tuple[float, float]:
    """The best bound of a moment and its price: 0.0 and 0.0 where nothing is to be bought."""
    if not moment.network.edges or budget_bytes < moment.occupied_bytes:
        return 0.0, 0.0
    best, best_price, low, high = 0.0, 0.0, 0.0, 0.0
    price = _first_price(moment.program, moment.network)
    for _ in range(_STEPS):
        if clock.is_over(deadline):
            break
        bound, slope = _cut_at(moment, weights, budget_bytes, price)
        if bound > best:
            best, best_price = bound, price
        if slope > 0:
            low = price
        else:
            high = price
        price = next_price(price, low, high)
        if low and high and high < low * 1.001:
            break
    return best, best_price


def next_price(price: float, low: float, high: float) -> float:
    """Choose the price to try next.

    It lies between one that is too low and one that is too high, or far beyond where either is missing (0).
    """
    if low and high:
        return float((low * high) ** 0.5)
    return price / 8 if high else price * 8


def _cut_at(moment: _Moment, weights: _Weights, budget_bytes: int, price: float) -> tuple[float, float]:
    """The bound of a moment at a price, and its slope in the price: by how many bytes the cut is above the budget."""
    free = budget_bytes - moment.occupied_bytes
    if not moment.network.edges or free < 0:
        return 0.0, 0.0
    cut = moment.network.solve(price, weights.nbytes, weights.seconds)
    return cut.cost - price * free, float(weights.nbytes[list(cut.kept)].sum()) - free


def _first_price(program: Program, network: Network) -> float:
    total = sum(program.values[v].nbytes for v in network.wanted)
    return sum(program.ops[i].again_seconds for i in network.ops) / max(1, total) or 1.0


def _together(program: Program, budget_bytes: int, ranked: list[int], deadline: float) -> float:
    """Seconds that any schedule needs because of what fits at several moments, one after the other."""
    count = min(_TOGETHER, _LARGEST // len(program.ops))
    if count < 2 or not ranked or clock.is_over(deadline):
        return 0.0
    table = _stages(program, budget_bytes, _spread(ranked, count)).table
    found = table.relax(min(_MOST_SECONDS, deadline - clock.worked()))
    return found.cost * _unit(program) if found and found.cost < inf else 0.0


def _all_along(program: Program, budget_bytes: int, deadline: float) -> float:
    """The same at moments all along where memory binds, more of them while there is work left.

    Where nothing is forward and nothing backward, other values fill the memory at other moments.
    """
    above = sum(nbytes > budget_bytes for nbytes in simulate(program).resident_bytes)
    most = min(_MOST_ALONG, above, _LARGEST_ALONG // len(program.ops))
    if not most:
        return 0.0
    telling, unit = Telling(program, budget_bytes, min(most, _FIRST_ALONG)), _unit(program)
    is_small = len(program.ops) <= _LARGEST_WHOLE_ALONG
    best = _by_fractions(telling, deadline, _FRACTIONS_SHARE if is_small else 1.0)
    return max(best, _by_whole_numbers(telling, deadline) if is_small else 0.0) * unit


def _by_fractions(telling: Telling, deadline: float, share: float) -> float:
    """The linear program at more and more moments, as many as fit into that share of the work."""
    best, now = 0.0, clock.worked()
    end = now + share * (deadline - now)
    while not clock.is_over(deadline):
        begin, count = clock.worked(), len(telling.moments)
        stages = _at_telling(telling)
        found = stages.table.relax(min(_MOST_ALONG_SECONDS, deadline - begin))
        if not found or found.cost == inf:
            break
        best, now = max(best, found.cost), clock.worked()
        left = _SURE * max(0.0, end - now)
        growth = min(_MOST_MORE, (left / (now - begin)) ** (1 / _GROWTH)) if now > begin else 1.0
        more = max(1, int(growth * count) - count)
        if growth < _LEAST_MORE or not telling.go_on(stages, found.point, more):
            break
    return best


def _by_whole_numbers(telling: Telling, deadline: float) -> float:
    """The integer program at these moments, and at those at which its optimum has too much in memory."""
    best = 0.0
    for _ in range(_LOOKS_WHOLE):
        if clock.is_over(deadline):
            break
        stages, begin = _at_telling(telling), clock.worked()
        found = stages.table.solve((deadline - begin) / _HARD, nodes=_NODES)
        clock.spend((_HARD - 1.0) * (clock.worked() - begin))
        best = max(best, found.bound * (1 - _TOLERANCE) if found.bound < inf else 0.0)
        if found.point is None or not telling.go_on(stages, found.point, _MORE_WHOLE, gives_up=False):
            break
    return best


def _at_telling(telling: Telling) -> Stages:
    """The linear program at the moments that tell most."""
    moments = telling.moments
    return _stages(telling.program, telling.budget_bytes, moments, looks_every=_LOOKS_EVERY, looks_at=_NEXT_ALONG)


def _whole(program: Program, budget_bytes: int, ranked: list[int], deadline: float) -> float:
    """The same with ops that cannot run half a time, and at fewer moments."""
    if len(program.ops) > _LARGEST_WHOLE or not ranked or clock.is_over(deadline):
        return 0.0
    count = max(2, min(_TOGETHER, _WHOLE // len(program.ops)))
    table = _stages(program, budget_bytes, _spread(ranked, count)).table
    found = table.solve(min(_MOST_SECONDS, deadline - clock.worked()), nodes=_NODES)
    return found.bound * _unit(program) * (1 - _TOLERANCE) if found.bound < inf else 0.0


def _stages(
    program: Program, budget_bytes: int, moments: list[int], *, looks_every: int = 1, looks_at: int = 0
) -> Stages:
    ends = sorted({*moments, len(program.ops) - 1})
    stages = Stages(program, budget_bytes, ends, unit_seconds=_unit(program))
    for w in range(looks_every, len(ends), looks_every):
        stages.since(w)
    for w in range(1, len(ends) if looks_at else 0):
        stages.since(w, min(w + looks_at, len(ends)) - 1)
    return stages


def _unit(program: Program) -> float:
    """Seconds per unit of cost, so that the tolerances of the solver are far below what counts."""
    return program.seconds / 1e4


def _spread(ranked: list[int], count: int) -> list[int]:
    """The best moment of each of ``count`` parts."""
    rank = {t: k for k, t in enumerate(ranked)}
    along = sorted(ranked)
    edges = [len(along) * k // count for k in range(count + 1)]
    return [min(along[a:b], key=rank.__getitem__) for a, b in pairwise(edges) if a < b]


@dataclass(frozen=True)
class _Moment:
    """The program at the first run of op ``t``: what is in memory in every schedule, and what may be."""

    program: Program
    t: int

    @cached_property
    def forced(self) -> frozenset[int]:
        """Values that no schedule can have dropped: held, read by the op itself, or read later and never made again."""
        program, t = self.program, self.t
        forced = {v for v in program.ops[t].reads if not program.values[v].fixed}
        for v, producer in enumerate(program.producer):
            if 0 <= producer < t:
                lasting = program.hold[v] >= t
                if lasting or (self.demanded(v) and program.ops[producer].once):
                    forced.add(v)
        return frozenset(forced)

    @cached_property
    def occupied_bytes(self) -> int:
        """Fixed and forced values, and what the op itself needs."""
        program, op = self.program, self.program.ops[self.t]
        written = sum(program.values[v].nbytes for v in op.writes)
        written -= sum(min(program.values[new].nbytes, program.values[old].nbytes) for new, old in op.in_place)
        return program.fixed_bytes + sum(program.values[v].nbytes for v in self.forced) + written + op.scratch_bytes

    def demanded(self, value: int) -> bool:
        """Whether op ``t`` or a later one reads the value."""
        readers = self.program.readers[value]
        return bool(readers) and readers[-1] >= self.t

    @cached_property
    def network(self) -> Network:
        """Keep or run again, for everything made before ``t``."""
        program, ops = self.program, self.program.ops
        return build(
            (i for i in range(self.t) if not ops[i].once),
            self.demanded,
            lambda v: program.values[v].fixed or v in self.forced,
            lambda v: True,
            lambda i: ops[i].writes,
            lambda i: ops[i].reads,
        )
