"""Uniform chains: Revolve's closed form as a lower bound, and its schedule as the optimum where that meets the bound.

Let values x_1, ..., x_N each be made from the one before by an op of u seconds, and have S bytes each;
let the backward read them in the order x_N, ..., x_1. When x_i is read there for the first time, at most c of
x_1, ..., x_{i-1} are in memory, whatever the schedule: more do not fit beside what must be there. Between these moments
memory may be as large as it likes. So every schedule is one of Griewank and Walther's (2000) with c slots and one more
for the source of x_1, which is always at hand, and its ops run at least as often as their closed form says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from autoremat.planner.search.account import Account, Accountant
from autoremat.planner.search.chain import Chain, chain_of
from autoremat.planner.search.tables import tables_of
from autoremat.planner.solvers.revolve import fewest_slots, revolve_forwards, revolve_runs
from autoremat.program import Program, Schedule

_CLOSE = 1e-3
"""A schedule this close to the bound, as a share of the program's seconds, is not worth a search."""

_TRIMMED = 3
"""How many values at the end of the chain the bound may leave out, where more room is at the turn than later."""

_SHORT = 4
"""Shorter chains are left to the search."""


@dataclass(frozen=True)
class Uniform:
    """A uniform chain of a program.

    Attributes:
        nbytes: of each value.
        seconds: of each op that makes one.
        beside_bytes: for x_1, x_2, ... the bytes that must be in memory when the backward first reads it, itself
            included, those before it in the chain not.
        floor_bytes: no schedule of the program has a lower peak.
    """

    nbytes: int
    seconds: float
    beside_bytes: tuple[int, ...]
    floor_bytes: int

    def slots(self, budget_bytes: int, trimmed: int = 0) -> int:
        """Slots that no schedule within the budget has more of, the source counted."""
        length = len(self.beside_bytes) - trimmed
        most = (budget_bytes - min(self.beside_bytes[1:length])) // self.nbytes
        return 1 + max(0, min(length, most))

    def extra_seconds(self, budget_bytes: int) -> float:
        """What the reruns of every schedule within the budget take at least."""
        return max(self._bound(budget_bytes, trimmed) for trimmed in range(min(_TRIMMED, len(self.beside_bytes) - 1)))

    def _bound(self, budget_bytes: int, trimmed: int) -> float:
        length = len(self.beside_bytes) - trimmed
        forwards = revolve_forwards(length + 1, self.slots(budget_bytes, trimmed))
        return (forwards - 2 * length - 1) * self.seconds


@dataclass(frozen=True)
class Proven:
    """What ``proven`` found: Revolve's schedule, or the lowest known one where no schedule fits.

    Attributes:
        schedule: the runs.
        fits: whether it is within the budget; if not, none is.
        floor_bytes: the smallest budget for which a schedule is known.
        lower_bound: extra seconds of every schedule within the budget, at least, as a share of the program's seconds.
    """

    schedule: Schedule
    fits: bool
    floor_bytes: int
    lower_bound: float


def proven(program: Program, budget_bytes: int) -> Proven | None:
    """Revolve's schedule, where the program has a uniform chain and little or nothing can be better. O(runs)."""
    uniform = uniform_of(program)
    if uniform is None:
        return None
    chain, accountant = chain_of(tables_of(program)), Accountant(program)
    fewest = fewest_slots(len(chain))
    lowest = _account(chain, accountant, fewest)
    floor = lowest.peak_bytes
    if floor > uniform.floor_bytes + (fewest - 1) * uniform.nbytes:
        return None
    bound = uniform.extra_seconds(budget_bytes) / program.seconds
    if budget_bytes < uniform.floor_bytes:
        return Proven(_schedule(program, lowest), False, floor, bound)
    most = uniform.slots(budget_bytes)
    for slots in range(most, max(fewest - 1, most - _TRIMMED), -1):
        account = _account(chain, accountant, slots)
        if account.peak_bytes <= budget_bytes:
            close = account.extra_seconds <= (bound + _CLOSE) * program.seconds
            return Proven(_schedule(program, account), True, floor, bound) if close else None
    return None


def _account(chain: Chain, accountant: Accountant, slots: int) -> Account:
    return accountant(accountant.order(revolve_runs(chain, slots)))


def _schedule(program: Program, account: Account) -> Schedule:
    return Schedule.from_order(program, account.order.tolist())


def uniform_of(program: Program) -> Uniform | None:
    """The longest uniform chain, None where it is short. O(reads)."""
    chain = _longest(program)
    if len(chain) < _SHORT:
        return None
    present = _present(program)
    reads = _first_reads(program, chain, present)
    if len(reads) < _SHORT or any(after >= before for before, after in pairwise(reads)):
        return None
    rank = {v: k for k, v in enumerate(chain)}
    beside = [
        present[i] - sum(program.values[v].nbytes for v in program.ops[i].reads if rank.get(v, k) < k)
        for k, i in enumerate(reads)
    ]
    value = chain[0]
    nbytes, seconds = program.values[value].nbytes, program.ops[program.producer[value]].again_seconds
    return Uniform(nbytes, seconds, tuple(beside), max(present))


def _first_reads(program: Program, values: Sequence[int], present: Sequence[int]) -> list[int]:
    """For each value of the chain its first reader after the chain; values at the end that have none are left out."""
    made = program.producer[values[-1]]
    later = [[i for i in program.readers[v] if i > made and program.ops[i].writes] for v in values]
    while len(later) > 1 and (not later[-1] or not later[-2] or later[-1][0] >= later[-2][0]):
        later.pop()
    if not all(later) or len(later) < 2:
        return []
    last = max((r for r in later[-1] if r < later[-2][0]), key=present.__getitem__)
    return [*(readers[0] for readers in later[:-1]), last]


def _longest(program: Program) -> list[int]:
    """The values of the longest chain of ops of equal seconds and bytes, each of which may run again."""
    before: dict[int, int] = {}
    length = [0] * len(program.values)
    for op in program.ops:
        sources = [v for v in op.reads if not program.values[v].fixed]
        if op.once or len(op.writes) != 1 or len(sources) > 1 or op.again_seconds <= 0 or op.in_place:
            continue
        (made,) = op.writes
        length[made] = 1
        if sources and length[sources[0]] and _alike(program, sources[0], made):
            before[made] = sources[0]
            length[made] += length[sources[0]]
    found = [max(range(len(length)), key=length.__getitem__)] if length else []
    while found and found[-1] in before:
        found.append(before[found[-1]])
    return found[::-1]


def _alike(program: Program, u: int, v: int) -> bool:
    ops, producer = program.ops, program.producer
    same_bytes = program.values[u].nbytes == program.values[v].nbytes > 0
    return same_bytes and ops[producer[u]].again_seconds == ops[producer[v]].again_seconds


def _present(program: Program) -> Sequence[int]:
    """For every op the bytes that are in memory during its first run in every schedule."""
    steps = [0] * (len(program.ops) + 1)
    until = list(program.hold)
    for v, made in enumerate(program.producer):
        if made >= 0 and program.ops[made].once and program.readers[v]:
            until[v] = max(until[v], program.readers[v][-1])
        if until[v] > made >= 0:
            steps[made + 1] += program.values[v].nbytes
            steps[until[v] + 1] -= program.values[v].nbytes
    lasting = [program.fixed_bytes + x for x in accumulate(steps[:-1])]
    nbytes = [value.nbytes for value in program.values]
    for i, op in enumerate(program.ops):
        lasting[i] += op.scratch_bytes + sum(nbytes[v] for v in op.writes)
        lasting[i] += sum(nbytes[v] for v in op.reads if not program.values[v].fixed and until[v] < i)
        lasting[i] -= sum(min(nbytes[new], nbytes[old]) for new, old in op.in_place)
    return lasting
