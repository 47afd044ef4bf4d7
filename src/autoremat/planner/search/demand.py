"""What every block of a chain takes: the bytes and seconds that rotor's dynamic programming reckons with.

Bytes are of everything, fixed values and gradients included, except what the chain schedule itself has stored. They are
estimates on the safe side: a state that is being used may be counted where it is stored and where it is used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from autoremat.planner.search.chain import Chain
from autoremat.planner.search.evict import Course, course_of
from autoremat.planner.search.tables import NEVER, Tables


@dataclass(frozen=True, eq=False)
class Demand:
    """Bytes and seconds by block.

    Attributes:
        state: bytes of the state that enters the block.
        whole: bytes of its products.
        advance_seconds: of a rerun up to the next state.
        tape_seconds: of a rerun for the products.
        whole_seconds: of a rerun for both.
        advance_bytes, whole_run_bytes: at most in memory during such a run, beyond the state that enters.
        beside_bytes: what is there when the backward of the block begins, before its reruns.
        target_bytes: needed for the last part of a sweep to the block and for its backward.
        backward_bytes: needed for its backward.
        forward_bytes_passing: needed in the first forward pass when nothing is kept of the block,
        forward_bytes_kept: ... when its state is, without that,
        forward_whole_bytes: ... when everything is, and for its backward.
    """

    state: tuple[int, ...]
    whole: tuple[int, ...]
    advance_seconds: tuple[float, ...]
    tape_seconds: tuple[float, ...]
    whole_seconds: tuple[float, ...]
    advance_bytes: tuple[int, ...]
    whole_run_bytes: tuple[int, ...]
    beside_bytes: tuple[int, ...]
    target_bytes: tuple[int, ...]
    backward_bytes: tuple[int, ...]
    forward_bytes_passing: tuple[int, ...]
    forward_bytes_kept: tuple[int, ...]
    forward_whole_bytes: tuple[int, ...]

    def sweep_bytes(self, s: int, t: int) -> int:
        """Needed to run from state s to block t again, keeping nothing between."""
        passing = (self.state[k] + self.advance_bytes[k] for k in range(s + 1, t))
        return self.beside_bytes[t] + max(self.advance_bytes[s], *passing, 0)

    def whole_bytes(self, s: int, t: int) -> int:
        """Needed to run block s again for everything, on the way to block t, and for its backward."""
        return max(self.beside_bytes[t] + self.whole_run_bytes[s], self.backward_bytes[s])

    def forward_bytes(self, s: int, k: int) -> int:
        """Needed in the first forward pass to keep state s and nothing more before state k."""
        return max(self.forward_bytes_kept[s], *self.forward_bytes_passing[s + 1 : k], 0)

    @property
    def turn_bytes(self) -> int:
        """Needed for the last block, which is kept whole, and its backward."""
        return self.forward_whole_bytes[-1]


def demand_of(chain: Chain) -> Demand:
    """The demand of a chain. O(reads + blocks * values of a block)."""
    tables, course, count = chain.tables, course_of(chain.tables), len(chain)
    following = [*chain.states[1:], ()]
    both = [tuple(sorted({*a, *b})) for a, b in zip(chain.advancing, chain.taping, strict=True)]
    begin = _backward_begins(chain)
    live, lingering = _live(chain, begin)
    backward = [
        max((course.during[i] + live[i] for i in range(begin[k], begin[k - 1] if k else len(tables.ops))), default=0)
        for k in range(count)
    ]
    beside = [course.before[b] + lingering[b] if b < len(tables.ops) else 0 for b in begin]
    taping = [_transient(tables, chain.taping[k], chain.products[k]) for k in range(count)]
    passing, kept, whole = zip(*(_forward(chain, course, k) for k in range(count)), strict=True)
    return Demand(
        state=tuple(map(chain.bytes_of, chain.states)),
        whole=tuple(map(chain.bytes_of, chain.products)),
        advance_seconds=tuple(map(chain.seconds_of, chain.advancing)),
        tape_seconds=tuple(map(chain.seconds_of, chain.taping)),
        whole_seconds=tuple(map(chain.seconds_of, both)),
        advance_bytes=tuple(_transient(tables, chain.advancing[k], following[k]) for k in range(count)),
        whole_run_bytes=tuple(_transient(tables, both[k], (*chain.products[k], *following[k])) for k in range(count)),
        beside_bytes=tuple(beside),
        target_bytes=tuple(max(backward[k], beside[k] + taping[k]) for k in range(count)),
        backward_bytes=tuple(backward),
        forward_bytes_passing=passing,
        forward_bytes_kept=kept,
        forward_whole_bytes=tuple(map(max, whole, backward)),
    )


def _backward_begins(chain: Chain) -> list[int]:
    """For every block the late op at which its backward begins; the first late op for the last block."""
    n = len(chain.tables.ops)
    begin = [n if m == NEVER else m for m in chain.moments]
    begin[-1] = min(begin[-1], next((i for i, late in enumerate(chain.tables.late) if late), n))
    return begin


def _live(chain: Chain, begin: Sequence[int]) -> tuple[list[int], list[int]]:
    """For every op the bytes that the backward still asks for: of its block's products and of what later blocks left.

    The second list is without the products of the block whose backward begins right there.
    """
    tables, n = chain.tables, len(chain.tables.ops)
    live, lingering = [0] * (n + 1), [0] * (n + 1)

    def add(steps: list[int], v: int, start: int) -> None:
        end = tables.ends[v][-1] + 1 if tables.ends[v] else 0
        if start < end:
            steps[start] += tables.values[v].nbytes
            steps[end] -= tables.values[v].nbytes

    for k in range(len(chain)):
        after = begin[k - 1] if k else n
        for v in chain.products[k]:
            add(live, v, begin[k])
            add(lingering, v, after)
        for v in set(chain.states[k]).difference(chain.states[k - 1] if k else ()):
            add(live, v, after)
            add(lingering, v, after)
    return list(accumulate(live)), list(accumulate(lingering))


def _transient(tables: Tables, ops: Sequence[int], wanted: Collection[int]) -> int:
    """The most bytes in memory while the ops run again, of what they make; in the end only ``wanted`` stays."""
    made = {v for i in ops for v in tables.ops[i].writes}
    last = {v: i for i in ops for v in tables.ops[i].reads if v in made}
    stays, current, peak = frozenset(wanted), 0, 0
    for i in ops:
        op = tables.ops[i]
        taken = sum(
            min(tables.values[new].nbytes, tables.values[old].nbytes)
            for new, old in op.in_place
            if last.get(old) == i and old not in stays
        )
        current += sum(tables.values[v].nbytes for v in op.writes)
        peak = max(peak, current - taken + op.again_scratch_bytes)
        gone = {v for v in op.reads if last.get(v) == i} | {v for v in op.writes if v not in last}
        current -= sum(tables.values[v].nbytes for v in gone - stays)
    return peak


def _forward(chain: Chain, course: Course, k: int) -> tuple[int, int, int]:
    """``forward_bytes_passing``, ``_kept`` and, without the backward, ``forward_whole_bytes`` of a block."""
    tables, ends = chain.tables, [0, *chain.cuts, len(chain.tables.ops)]
    early = tables.early[bisect_left(tables.early, ends[k]) : bisect_left(tables.early, ends[k + 1])]
    passing = kept = whole = 0
    for i in early:
        in_use = sum(tables.values[v].nbytes for v in chain.states[k] if tables.until[v] >= i)
        saved = sum(tables.values[v].nbytes for v in chain.products[k] if tables.until[v] < i)
        passing = max(passing, course.during[i])
        kept = max(kept, course.during[i] - in_use)
        whole = max(whole, course.during[i] - in_use + saved)
    return passing, kept, whole
