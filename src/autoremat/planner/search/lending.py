"""rotor with a third choice: what is stored in the first forward pass stays, or is lent to a slower tier.

Beaumont, Eyraud-Dubois and Shilova 2021, "Efficient combination of rematerialization and offloading for training DNNs"
(POFO), add this choice to the dynamic programming of rotor (``solvers/rotor.py``): only what the first pass stores is
ever moved, once, and it is away until the backward comes to it. Lent memory is free while the blocks behind are run
forward and backward; it is needed where the block is.

They keep account of what the link still has to do in the tables. Here moving costs a *price* per byte instead, and the
tables are solved for a few of them, from next to nothing (all copies run beside ops) to what the copies take (none
does). What that gives is an order of runs and the values to lend; when each of these moves is for ``moving``, and what
it really takes for ``simulate``, by the clocks of ops and link.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from autoremat.planner import clock
from autoremat.planner.search.call_account import accountant_of
from autoremat.planner.search.calls import planned_as, unfolded
from autoremat.planner.search.chain import Chain, chain_of
from autoremat.planner.search.demand import demand_of
from autoremat.planner.search.moving import moved
from autoremat.planner.search.tables import tables_of
from autoremat.planner.solvers.rotor import Costs, Table
from autoremat.program import Link, Program, Schedule

_MOST_BLOCKS: Final = 60
_SLOTS: Final = 200
_PRICES: Final = (0.01, 0.1, 0.3, 1.0)
"""As shares of what the copies out and back take."""
_LIMITS: Final = (1.25, 1.12, 1.0, 0.9)
"""Limits around the budget: the bytes beside the chain are estimates, mostly on the safe side."""
_LIMIT_SECONDS: Final = 3.0
"""The limit of time for all prices: enough for thousands of ops."""
_TABLE_SECONDS: Final = 0.05
"""What the tables of one price count as work."""


class Lent(NamedTuple):
    """What a walk through the tables decides: the sweeps that are left, and the values that are lent."""

    left: list[tuple[int, int, int]]
    values: frozenset[int]


def lent_schedules(linked: Program, budget_bytes: int) -> list[Schedule]:
    """Schedules of the dynamic programming within the budget; at most one for each price.

    Args:
        linked: a program with a link.
        budget_bytes: of the peak.
    """
    with clock.limited(_LIMIT_SECONDS):
        return list(_lent(linked, budget_bytes))


def _lent(linked: Program, budget_bytes: int) -> Iterator[Schedule]:
    planned = planned_as(linked)
    tables = tables_of(planned)
    if tables.passing or not tables.early or linked.link is None:
        return
    chain, accountant = chain_of(tables, _MOST_BLOCKS), accountant_of(planned)
    table = Table(demand_of(chain), int(budget_bytes * max(_LIMITS)), _SLOTS)
    for share in _PRICES:
        clock.spend(_TABLE_SECONDS)
        lending = Lending(table, chain, share * _seconds_per_byte(linked.link))
        tried = set[int]()
        for limit in (int(table.slots * k / max(_LIMITS)) for k in _LIMITS):
            found = lending.walk(limit)
            if found is None or limit in tried:
                continue
            tried.add(limit)
            order = accountant.order(chain.runs(table.sweeps_of(found.left)))
            base = unfolded(linked, Schedule.from_order(planned, order.tolist()))
            schedule = moved(linked, base, budget_bytes, first=frozenset() if linked.has_calls else found.values)
            if schedule is not None:
                yield schedule
                break
        if clock.is_over():
            return


def _seconds_per_byte(link: Link) -> float:
    return 1 / link.out_bytes_per_second + 1 / link.in_bytes_per_second


class Lending:
    """The first pass through a chain, with a price for what is lent.

    ``first[s, m]`` are the seconds from block s to the end with m slots and state s there beside them, as in rotor;
    ``lent[s, m]`` the same where state s is in these slots while block s runs, and away meanwhile.

    Args:
        table: of rotor, for what runs again.
        chain: that it is of.
        price: seconds a byte.
    """

    def __init__(self, table: Table, chain: Chain, price: float) -> None:
        self._table, self._chain, self._price = table, chain, price
        self.first: Costs = np.full_like(table.first, np.inf)
        self.lent: Costs = np.full_like(table.first, np.inf)
        last = table.count - 1
        self.first[last] = table.first[last]
        for s in range(last - 1, -1, -1):
            self.first[s] = self._choices(s, is_lent=False).min(axis=0)
            self.lent[s] = self._choices(s, is_lent=True).min(axis=0)

    def walk(self, slots: int) -> Lent | None:
        """The best way with so many slots; None where there is none."""
        if not np.isfinite(self.first[0, slots]):
            return None
        t, left, values = self._table, list[tuple[int, int, int]](), set[int]()
        s, m, is_lent = 0, slots, False
        while s < t.count - 1:
            choice = int(self._choices(s, is_lent=is_lent)[:, m].argmin())
            inside = m - t.units(t.demand.state[s]) if is_lent else m
            if choice < 2:
                k = s + 1
                values.update(self._chain.products[s] if choice else ())
                m -= 0 if choice else t.units(t.demand.whole[s])
            else:
                k = s + choice - 1
                left.append((s, k - 1, inside))
            is_lent = bool(self.lent[k, m] < self._kept(k)[m])
            values.update(self._chain.states[k] if is_lent else ())
            m -= 0 if is_lent else t.units(t.demand.state[k])
            s = k
        return Lent(left, frozenset(values))

    def _choices(self, s: int, *, is_lent: bool) -> Costs:
        """Seconds by choice: the products stay; are lent; or nothing stays up to state s + 1, s + 2, ..."""
        t, d = self._table, self._table.demand
        beside, paid = (d.state[s], self._price * d.state[s]) if is_lent else (0, 0.0)
        after = [self._after(k) for k in range(s + 1, t.count)]
        rows = [t.moved(after[0], d.whole[s]), after[0] + np.float32(self._price * d.whole[s])]
        for row in rows:
            row[: t.units(d.forward_whole_bytes[s] + beside)] = np.inf
        for k, behind in enumerate(after, s + 1):
            row = t.moved(t.again[s, k - 1], beside) + behind
            row[: t.units(d.forward_bytes(s, k) + beside)] = np.inf
            rows.append(row)
        choices: Costs = np.stack(rows) + np.float32(paid)
        return choices

    def _kept(self, k: int) -> Costs:
        return self._table.moved(self.first[k], self._table.demand.state[k])

    def _after(self, k: int) -> Costs:
        """From state k on, whether that stays or is lent."""
        better: Costs = np.minimum(self._kept(k), self.lent[k])
        return better
