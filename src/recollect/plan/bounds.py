"""A lower bound on the overhead of every schedule within a budget.

Take any point of the program, just when op ``t`` runs for the first time. What is in memory then fits into the budget,
and whatever later ops read and is not in memory must be made again from what is. Whoever may choose freely what is in
memory at that moment, pays for no other moment, and runs no op more than once more, does at least as well as any real
schedule. That relaxed choice under its one constraint on bytes is relaxed once more with a Lagrange multiplier: the
minimum cut of ``min_cut`` at price ``p``, less ``p`` times the free bytes, is a bound for every ``p >= 0``; it is
concave in ``p``, so bisection on the sign of its slope finds the best. Rounding inside the cut is always downwards.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recollect.plan.min_cut import Network, build
from recollect.plan.tables import split_point
from recollect.program import Program, simulate


def lower_bound(
    program: Program, budget_bytes: int, *, points: int = 6, steps: int = 24, deadline: float = float("inf")
) -> float:
    """A fraction of the program's seconds below which the overhead of no schedule within the budget can be.

    The schedules meant are all that run every op in program order plus further runs of repeatable ops anywhere. Never
    negative; 0.0 for a program without seconds. ``points * steps`` minimum cuts at most; stops at ``deadline``
    (on ``time.monotonic``) with what it has.
    """
    if program.seconds <= 0:
        return 0.0
    best = 0.0
    for t in interesting_points(program, points):
        if time.monotonic() > deadline:
            break
        best = max(best, bound_at(program, t, budget_bytes, steps=steps, deadline=deadline))
    # The cut is exact integers divided by a float: a hair less keeps the bound below the truth.
    return max(0.0, best * (1 - 1e-12) / program.seconds)


def interesting_points(program: Program, count: int) -> list[int]:
    """Where memory is likely to bind: the beginning of the backward, the plain peak, points along the backward."""
    last = len(program.ops) - 1
    if last < 0:
        return []
    split = min(split_point(program), last)
    along = [split + (last - split) * k // (2 * count) for k in range(1, count)]
    return list(dict.fromkeys([split, simulate(program).peak_op, max(split - 1, 0), *along]))[:count]


def bound_at(program: Program, t: int, budget_bytes: int, *, steps: int = 24, deadline: float = float("inf")) -> float:
    """Seconds of further runs that any schedule within the budget needs because of what fits when op ``t`` runs."""
    moment = _Moment(program, t)
    free = budget_bytes - moment.occupied_bytes
    network = moment.network
    if not network.edges or free < 0:
        return 0.0
    seconds = np.array([op.seconds for op in program.ops])
    nbytes = np.array([float(v.nbytes) for v in program.values])
    best, low, high = 0.0, 0.0, 0.0
    price = _first_price(program, network)
    for _ in range(steps):
        if time.monotonic() > deadline:
            break
        cut = network.solve(price, nbytes, seconds)
        best = max(best, cut.cost - price * free)
        if sum(program.values[v].nbytes for v in cut.kept) > free:
            low = price
        else:
            high = price
        price = (low * high) ** 0.5 if low and high else price * 8 if not high else price / 8
        if low and high and high < low * 1.001:
            break
    return best


def _first_price(program: Program, network: Network) -> float:
    total = sum(program.values[v].nbytes for v in network.wanted)
    return sum(program.ops[i].seconds for i in network.ops) / max(1, total) or 1.0


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
                if lasting or (self.demanded(v) and program.ops[producer].repeatable):
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
            (i for i in range(self.t) if not ops[i].repeatable),
            self.demanded,
            lambda v: program.values[v].fixed or v in self.forced,
            lambda v: True,
            lambda i: ops[i].writes,
            lambda i: ops[i].reads,
        )
