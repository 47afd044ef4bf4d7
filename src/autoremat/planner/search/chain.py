"""A program as a chain of blocks: what the classics for chains (Chen, Revolve, rotor) need to know of any program.

The forward is cut where little crosses. Block k turns state k, the values that cross into it, into state k + 1; its
backward begins at its *moment*, the first late op that asks for state k or for what only block k has. A chain schedule
is a list of *sweeps*: before the backward of a block, run again from some state up to that block. Which states stay in
between follows from the order of the runs alone (``Schedule.from_order``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoremat.planner.search.account import Account
from autoremat.planner.search.call_account import accountant_of
from autoremat.planner.search.tables import NEVER, Tables
from autoremat.planner.solvers.segments import boundaries, narrow_cuts
from autoremat.program import Program, Schedule

Runs = list[tuple[int, int]]
"""Reruns as ``(late op before which it happens, op)``."""


@dataclass(frozen=True)
class Sweep:
    """Before the backward of block ``target``, run the blocks from ``start`` on again.

    The blocks before ``target`` run as far as their next state needs it, those in ``whole`` and the target itself for
    everything that their backward asks for.
    """

    target: int
    start: int
    whole: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Chain:
    """A program cut into blocks; every sequence is indexed by block.

    Attributes:
        tables: of the program.
        cuts: the ops with which the blocks after the first begin; the last block may be empty.
        states: droppable values that cross into the block.
        products: droppable values which the backward asks for and which are made in the block and cross no cut.
        advancing: the ops that make the next state from the block's own.
        taping: the ops that make the products.
        moments: the late op at which the backward of the block begins; falling.
    """

    tables: Tables
    cuts: tuple[int, ...]
    states: tuple[tuple[int, ...], ...]
    products: tuple[tuple[int, ...], ...]
    advancing: tuple[tuple[int, ...], ...]
    taping: tuple[tuple[int, ...], ...]
    moments: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.states)

    def runs(self, sweeps: Iterable[Sweep]) -> Runs:
        """The reruns of a chain schedule. O(runs)."""
        found: Runs = []
        for sweep in sweeps:
            moment = self.moments[sweep.target]
            if moment == NEVER:
                continue
            for k in range(sweep.start, sweep.target):
                found += [(moment, i) for i in self.advancing[k]]
                if k in sweep.whole:
                    found += [(moment, i) for i in self.taping[k]]
            found += [(moment, i) for i in self.taping[sweep.target]]
        return found

    def bytes_of(self, values: Iterable[int]) -> int:
        """Their sum."""
        return sum(self.tables.values[v].nbytes for v in values)

    def seconds_of(self, ops: Iterable[int]) -> float:
        """Their sum."""
        return sum(self.tables.ops[i].again_seconds for i in ops)


def chain_of(tables: Tables, most: int = NEVER) -> Chain:
    """The program as a chain of at most so many blocks; each has something that the backward asks for.

    The cuts are where at most one value crosses, every second or so of them where there are too many; where one block
    between them would hold more than a quarter of what the backward needs, the cheapest cuts near equal shares.
    O(blocks * values).
    """
    cuts = narrow_cuts(tables)
    cuts = cuts[:: 1 + len(cuts) // most] or boundaries(tables, min(most, len(tables.early)))
    chain = _cut(tables, cuts)
    asked = [m < NEVER for m in chain.moments[1 : len(cuts) + 1]]
    return chain if all(asked) else _cut(tables, tuple(c for c, some in zip(cuts, asked, strict=True) if some))


def pick(program: Program, budget_bytes: int, plans: Iterable[Runs]) -> Schedule:
    """Of the plans that fit the one with the fewest seconds, where none fits the one with the lowest peak."""
    accountant = accountant_of(program)
    accounts = (accountant(accountant.order(runs)) for runs in plans)
    best = min(accounts, key=lambda account: _rank(account, budget_bytes))
    return Schedule.from_order(program, best.order.tolist())


def _rank(account: Account, budget_bytes: int) -> tuple[bool, float, float]:
    fits = account.peak_bytes <= budget_bytes
    seconds, peak = account.extra_seconds, float(account.peak_bytes)
    return (not fits, seconds, peak) if fits else (not fits, peak, seconds)


def _cut(tables: Tables, cuts: tuple[int, ...]) -> Chain:
    count = len(cuts) + 1
    states: list[list[int]] = [[] for _ in range(count)]
    products: list[list[int]] = [[] for _ in range(count)]
    for v in tables.droppable:
        home = bisect_right(cuts, tables.producer[v])
        last = max((i for i in tables.early_readers[v] if tables.rerunnable[i]), default=-1)
        for k in range(home + 1, bisect_right(cuts, last) + 1):
            states[k].append(v)
        if bisect_right(cuts, last) <= home and tables.starts[v]:
            products[home].append(v)
    if _turns_on_one_value(tables, states[-1], products[-1]):
        cuts, count = (*cuts, tables.early[-1] + 1), count + 1
        states.append(products[-1])
        products[-1:] = [[], []]
    begin = [0, *cuts]
    following = [*states[1:], []]
    advancing = tuple(_closure(tables, [v for v in following[k] if tables.producer[v] >= b], b)
                      for k, b in enumerate(begin))  # fmt: skip
    taping = tuple(_closure(tables, products[k], b) for k, b in enumerate(begin))
    asked = [products[k] + [v for v in states[k] if k == bisect_right(cuts, tables.producer[v]) + 1]
             for k in range(count)]  # fmt: skip
    return Chain(
        tables, cuts, tuple(map(tuple, states)), tuple(map(tuple, products)), advancing, taping,
        _moments(tables, asked),
    )  # fmt: skip


def _turns_on_one_value(tables: Tables, state: Sequence[int], products: Sequence[int]) -> bool:
    """Whether the last block ends in one value, which the backward is through with before it asks for the state."""
    if len(products) != 1 or not state:
        return False
    wanted_before = min(tables.first_start(v, -1) for v in state)
    return tables.ends[products[0]][-1] < wanted_before < NEVER


def _closure(tables: Tables, values: Sequence[int], begin: int) -> tuple[int, ...]:
    """The ops from ``begin`` on that make the values, in program order."""
    forever = len(tables.ops) - 1
    seen: set[int] = set()
    stack = [tables.producer[v] for v in values]
    while stack:
        i = stack.pop()
        if i not in seen:
            seen.add(i)
            stack += [
                tables.producer[u]
                for u in tables.reads[i]
                if tables.producer[u] >= begin and not tables.kept[u] and tables.until[u] < forever
            ]
    return tuple(sorted(seen))


def _moments(tables: Tables, asked: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """When the backward first asks for something of each block, after it has asked for the next block's."""
    moments = [NEVER] * len(asked)
    before = -1
    for k in reversed(range(len(asked))):
        moments[k] = min((tables.first_start(v, before) for v in asked[k]), default=NEVER)
        before = moments[k] if moments[k] < NEVER else before
    return tuple(moments)
