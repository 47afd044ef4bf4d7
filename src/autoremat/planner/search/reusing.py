"""Spend the room that an order of runs leaves: let a value stay until it is needed again, spare the rerun.

Works on any order, wherever it comes from. Every rerun is a choice that can be taken back where the bytes of its
results fit into all the runs between; with it go the runs that only fed it. Best seconds per byte first, until nothing
more fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from autoremat.planner import clock
from autoremat.planner.search.account import Account, Accountant
from autoremat.planner.search.tables import Tables

Runs = list[tuple[int, int]]

_RUN_SECONDS = 2e-5
"""What a sweep counts as work, for each of the runs."""

_FARTHEST = 20
"""How many runs an estimate of what is spared looks at."""


def reuse(
    tables: Tables, accountant: Accountant, runs: Runs, budget_bytes: int, *, rounds: int = 12,
    noise: Callable[[], float] = lambda: 1.0,
) -> tuple[Runs, Account]:  # fmt: skip
    """Fewer reruns within the budget, and their account; ``runs`` as they are if they are above it already."""
    runs = sorted(set(runs))
    account = accountant.with_byproducts(accountant.order(runs))
    if account.peak_bytes > budget_bytes:
        return runs, account
    for _ in range(rounds):
        if clock.is_over():
            break
        clock.spend(_RUN_SECONDS * len(account.order))
        spared = _spare(_ledger(tables, account), account, budget_bytes, noise)
        if len(spared) <= len(runs) // 1000:
            break
        fewer = [run for run in runs if run not in spared]
        lighter = accountant.with_byproducts(accountant.order(fewer))
        if lighter.peak_bytes > budget_bytes:  # the room was judged gap by gap: together they may not fit
            break
        runs, account = fewer, lighter
    return runs, account


@dataclass(frozen=True, eq=False)
class _Ledger:
    """Who reads what in one order: ``fed`` for every run the residencies it reads, ``made`` those that it begins.

    ``uses`` counts the reads of each residency; it falls as runs are spared. ``late`` is the late op each run precedes.
    """

    tables: Tables
    order: list[int]
    late: list[int]
    further: list[bool]
    fed: list[list[int]]
    made: list[list[int]]
    uses: list[int]
    maker: list[int]
    spared: set[int] = field(default_factory=set)

    def feeders(self, run: int, most: int = 1 << 60) -> list[int]:
        """The reruns that become idle with the given one, itself first, at most so many; lowers ``uses``."""
        found, stack = list[int](), [run]
        while stack and len(found) < most:
            r = stack.pop()
            found.append(r)
            for k in self.fed[r]:
                self.uses[k] -= 1
                maker = self.maker[k]
                if self.further[maker] and not any(self.uses[x] for x in self.made[maker]):
                    stack.append(maker)
        return found

    def restore(self, runs: list[int]) -> None:
        """Take ``feeders`` back."""
        for r in runs:
            for k in self.fed[r]:
                self.uses[k] += 1


def _ledger(tables: Tables, account: Account) -> _Ledger:
    order = account.order.tolist()
    seen: set[int] = set()
    further: list[bool] = []
    for i in order:
        further.append(i in seen)
        seen.add(i)
    late, due = [0] * len(order), 0
    for p in range(len(order) - 1, -1, -1):
        due = due if further[p] else order[p]
        late[p] = due
    fed: list[list[int]] = [[] for _ in order]
    made: list[list[int]] = [[] for _ in order]
    bounds = [*account.first_access.tolist(), len(account.access)]
    access, starts = account.access.tolist(), account.start.tolist()
    for k, (begin, end) in enumerate(pairwise(bounds)):
        made[starts[k]].append(k)
        for run in access[begin + 1 : end]:
            fed[run].append(k)
    uses = [end - begin - 1 for begin, end in pairwise(bounds)]
    return _Ledger(tables, order, late, further, fed, made, uses, starts)


def _may_stay(tables: Tables, owner: list[int], k: int) -> bool:
    """Whether the residency before ``k``, of the same value, may last until it."""
    v = owner[k]
    is_second = k < 2 or owner[k - 2] != v
    return tables.keepable[v] and not (is_second and v in tables.passing)


def _spare(ledger: _Ledger, account: Account, budget_bytes: int, noise: Callable[[], float]) -> set[tuple[int, int]]:
    """The reruns that one sweep makes superfluous."""
    tables, during = ledger.tables, account.during.copy()
    owner, ends = account.value.tolist(), account.end.tolist()
    options = []
    for run, again in enumerate(ledger.further):
        wanted = [k for k in ledger.made[run] if ledger.uses[k]] if again else []
        if again and all(_may_stay(tables, owner, k) for k in wanted):
            idle = ledger.feeders(run, _FARTHEST)
            ledger.restore(idle)
            seconds = sum(tables.ops[ledger.order[r]].again_seconds for r in idle)
            nbytes = sum(tables.values[owner[k]].nbytes for k in wanted)
            options.append((-(seconds + 1e-12) / (nbytes + 1) * noise(), run, wanted))
    touched: set[int] = set()
    for _, run, wanted in sorted(options):
        made = [owner[k] for r in (run,) for k in ledger.made[r]]
        if run in ledger.spared or not touched.isdisjoint(made):
            continue
        room = [(ends[k - 1] + 1, run, tables.values[owner[k]].nbytes) for k in wanted]
        for begin, end, nbytes in room:
            during[begin:end] += nbytes
        if any(int(during[begin:end].max(initial=0)) > budget_bytes for begin, end, _ in room):
            for begin, end, nbytes in room:
                during[begin:end] -= nbytes
            continue
        for k in wanted:
            ledger.uses[k - 1] += ledger.uses[k]
        idle = ledger.feeders(run)
        ledger.spared.update(idle)
        touched.update(owner[k] for r in idle for k in ledger.made[r])
    return {(ledger.late[r], ledger.order[r]) for r in ledger.spared}
