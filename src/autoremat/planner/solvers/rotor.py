"""rotor: dynamic programming over a chain of unequal blocks.

Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova 2019, "Optimal checkpointing for heterogeneous chains: how to train
deep neural networks with limited memory", Theorem 1 and Algorithm 1. To run the blocks s..t forward and backward with m
bytes, either run s for everything that its backward asks for and keep that (``F_all``), or keep its input only
(``F_ck``), go on to some s' without keeping anything (``F_none``), do s'..t with what is left, then s..s'-1 again. That
is optimal among the *memory-persistent* schedules, in which what is kept stays until its backward. Memory is in slots,
and sizes are rounded up, as in rotor.

Two things differ from the paper, because only reruns cost something here: the first forward pass, which is free,
has a table of its own; and a block that runs again only for its output may leave out some of its ops. Since what bytes
there are beside the chain is only estimated per block, limits around the budget are tried, and simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd, inf

import numpy as np
import numpy.typing as npt

from autoremat.planner.search.account import Accountant
from autoremat.planner.search.call_account import accountant_of
from autoremat.planner.search.chain import Chain, Runs, Sweep, chain_of, pick
from autoremat.planner.search.demand import Demand, demand_of
from autoremat.planner.search.tables import tables_of
from autoremat.planner.solvers.revolve import most_that_fit
from autoremat.program import Program, Schedule

Costs = npt.NDArray[np.float32]
_Choose = Callable[[int, int, int], int]

MOST_BLOCKS = 200
_SLOTS = 500
_SPARE = 1.25
"""Limits up to so many times the budget are tried: rounding and estimates are on the safe side."""
_CLIMB = 6
"""How many limits above the highest that is known to fit are tried."""


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Find the best schedule on at most 200 blocks.

    It has about 500 slots. O(blocks^3 * slots).
    """
    chain, accountant = chain_of(tables_of(program), MOST_BLOCKS), accountant_of(program)
    return pick(program, budget_bytes, rotor_plans(chain, accountant, budget_bytes))


def rotor_plans(chain: Chain, accountant: Accountant, budget_bytes: int, slots: int = _SLOTS) -> Iterator[Runs]:
    """Make plans with limits around the highest that fits.

    Where none is within the budget, there is one with the lowest limit.
    """
    demand = demand_of(chain)
    table = Table(demand, int(budget_bytes * _SPARE), slots)
    limits = table.limits()

    def fits(k: int) -> bool:
        """Tell whether the plan with the k-th lowest limit fits."""
        return accountant(accountant.order(chain.runs(table.sweeps(limits[k - 1])))).peak_bytes <= budget_bytes

    highest = most_that_fit(len(limits), fits) - 1
    plans = [chain.runs(table.sweeps(limit)) for limit in limits[highest : highest + _CLIMB]]
    yield from plans
    if not any(accountant(accountant.order(runs)).peak_bytes <= budget_bytes for runs in plans):
        enough = max(1, budget_bytes, accountant(accountant.order(())).peak_bytes)
        while not limits:
            table = Table(demand, int(enough * _SPARE), slots)
            limits, enough = table.limits(), 2 * enough
        yield chain.runs(table.sweeps(limits[0]))


class Table:
    """The cheapest way through every part of a chain.

    There is one for every number of memory slots.

    ``again[s, t, m]`` are the seconds of reruns for the blocks s..t when the backward of t comes next and only
    state s, outside of the m slots, is there; ``shifted[t, s, m]`` the same when state s takes its place in the slots
    first. ``first[s, m]`` is for the first forward pass, from s to the end.
    """

    def __init__(self, demand: Demand, most_bytes: int, slots: int) -> None:
        self.demand = d = demand
        self.count = len(d.state)
        slots = max(16, min(slots, 20_000_000 // self.count**2))
        grain = gcd(*d.state, *d.whole) or 1
        # A slot is a whole part of the common divisor of all sizes, or a multiple of it: equal sizes lose nothing.
        self._parts = max(1, slots * grain // max(1, most_bytes))
        self._of_bytes = grain * max(1, -(-most_bytes // (slots * grain)))
        self.slots = most_bytes * self._parts // self._of_bytes
        shape = (self.count, self.count, self.slots + 1)
        self.again: Costs = np.full(shape, np.inf, dtype=np.float32)
        self.shifted: Costs = np.full(shape, np.inf, dtype=np.float32)
        self.first: Costs = np.full((self.count, self.slots + 1), np.inf, dtype=np.float32)
        self.advance = np.concatenate([[0.0], np.cumsum(d.advance_seconds)]).astype(np.float32)
        for t in range(self.count):
            for s in range(t, -1, -1):
                self._solve(s, t)
        for s in range(self.count - 1, -1, -1):
            self._solve_first(s)

    def limits(self) -> list[int]:
        """List the numbers of slots at which the seconds fall, ascending."""
        row = self.first[0]
        falls = np.flatnonzero(row[1:] < row[:-1]) + 1
        start = [0] if np.isfinite(row[0]) else []
        return [*start, *falls.tolist()]

    def sweeps(self, slots: int) -> Iterator[Sweep]:
        """List the sweeps for a number of slots.

        They come after the first forward pass.
        """
        left: list[tuple[int, int, int]] = []
        self._walk(0, self.count - 1, slots, left, self._choose_first)
        yield from self.sweeps_of(left)

    def sweeps_of(self, left: list[tuple[int, int, int]]) -> Iterator[Sweep]:
        """List the sweeps for parts ``(s, t, slots)`` of the chain."""
        left = list(left)
        while left:
            s, t, m = left.pop()
            yield Sweep(t, s, self._walk(s, t, m, left, self._choose))

    # -- the recurrences -----------------------------------------------------------------------------------------------

    def _solve(self, s: int, t: int) -> None:
        d, row = self.demand, self.again[s, t]
        if s == t:
            row[self.units(d.target_bytes[t]) :] = d.tape_seconds[t]
        else:
            split = self.again[s, s:t] + self.shifted[t, s + 1 : t + 1]
            split += (self.advance[s + 1 : t + 1] - self.advance[s])[:, None]
            row[:] = split.min(axis=0)
            row[: self.units(d.sweep_bytes(s, t))] = np.inf
            whole = d.whole_seconds[s] + self.moved(self.shifted[t, s + 1], d.whole[s])
            whole[: self.units(d.whole_bytes(s, t))] = np.inf
            np.minimum(row, whole, out=row)
        self.shifted[t, s] = self.moved(row, d.state[s])

    def _solve_first(self, s: int) -> None:
        row = self.first[s]
        if s == self.count - 1:
            row[self.units(self.demand.turn_bytes) :] = 0.0
            return
        row[:] = self._first_splits(s).min(axis=0)
        np.minimum(row, self._first_whole(s), out=row)

    def _first_splits(self, s: int) -> Costs:
        """Keep state s, and go on to every s' beyond it."""
        d = self.demand
        after = range(s + 1, self.count)
        table = np.stack([self.moved(self.first[k], d.state[k]) for k in after])
        table += self.again[s, s : self.count - 1]
        for k in after:
            table[k - s - 1, : self.units(d.forward_bytes(s, k))] = np.inf
        return table

    def _first_whole(self, s: int) -> Costs:
        d = self.demand
        row = self.moved(self.first[s + 1], d.whole[s], d.state[s + 1])
        row[: self.units(d.forward_whole_bytes[s])] = np.inf
        return row

    def units(self, nbytes: int) -> int:
        """Count the slots of so many bytes, at most one extra."""
        return max(0, min(-(-nbytes * self._parts // self._of_bytes), self.slots + 1))

    def moved(self, row: Costs, *nbytes: int) -> Costs:
        """Shift the costs by so many bytes of the slots."""
        by = min(sum(self.units(n) for n in nbytes), self.slots + 1)
        moved = np.full_like(row, np.inf)
        moved[by:] = row[: self.slots + 1 - by]
        return moved

    # -- from the table to the schedule --------------------------------------------------------------------------------

    def _walk(self, s: int, t: int, m: int, left: list[tuple[int, int, int]], choose: _Choose) -> frozenset[int]:
        """Walk one sweep from state s to block t.

        There are m slots; it says which blocks run whole, and ``left`` gets what is still to do.
        """
        d, whole = self.demand, set[int]()
        while s < t:
            k = choose(s, t, m)
            if k == s:
                whole.add(s)
                k = s + 1
                m -= self.units(d.whole[s])
            else:
                left.append((s, k - 1, m))
            m -= self.units(d.state[k])
            s = k
        return frozenset(whole)

    def _choose(self, s: int, t: int, m: int) -> int:
        """Choose the next state to keep, or s itself.

        It is s when block s is kept whole.
        """
        d = self.demand
        split = self.again[s, s:t, m] + self.shifted[t, s + 1 : t + 1, m]
        split = split + self.advance[s + 1 : t + 1] - self.advance[s]
        if m < self.units(d.sweep_bytes(s, t)):
            split[:] = np.inf
        rest = m - self.units(d.whole[s])
        whole = np.inf
        if rest >= 0 and m >= self.units(d.whole_bytes(s, t)):
            whole = d.whole_seconds[s] + self.shifted[t, s + 1, rest]
        return s if whole <= split.min() else s + 1 + int(split.argmin())

    def _choose_first(self, s: int, t: int, m: int) -> int:
        split = self._first_splits(s)[:, m]
        return s if self._first_whole(s)[m] <= split.min() else s + 1 + int(split.argmin())
