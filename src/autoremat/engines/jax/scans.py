"""What a scan stacks for its backward, by price; and into what segments it is cut.

A byte that goes from the forward of an iteration to its backward costs as often as the scan is long. So the body is cut
at prices: for each, a minimum cut says what is kept. Beside that, a scan may be cut into segments: then only the carry
at the beginning of each segment stays, and a segment runs forward once more ahead of its backward; segments of segments
likewise. A *choice* is one of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from autoremat.engines.jax.facts import nbytes
from autoremat.engines.jax.lowering import Lowered
from autoremat.engines.jax.recording import Recorded
from autoremat.planner.search.min_cut import Pricer
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.program import Schedule, simulate

_PRICES: Final = 12
_ALL_OF_ONE: Final = 512
"""Iterations up to which all segments are tried, without segments inside."""
_ALL_OF_TWO: Final = 24
"""The same with segments inside."""
_STEP: Final = 1.3
"""From one length of segments to the next, where not all are tried."""


@dataclass(frozen=True)
class Shape:
    """The form of a scan.

    Attributes:
        length: how many iterations.
        n_consts: how many inputs of the body are the same for all iterations.
        n_carry: how many go from one to the next.
        is_reversed: whether the last one comes first.
        unroll: how many iterations are written out in a row, as the user asked.
    """

    length: int
    n_consts: int
    n_carry: int
    is_reversed: bool
    unroll: int


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to run a scan and its backward.

    Attributes:
        segments: lengths of segments, the longest first; none: the iterations alone.
        body: forward and backward of one iteration.
        nbytes: estimated bytes beside inputs and outputs.
        extra_seconds: estimated seconds of what is computed again.
    """

    segments: tuple[int, ...]
    body: Lowered
    nbytes: int
    extra_seconds: float

    def cost(self, price: float) -> float:
        """Seconds, where a byte costs so many."""
        return self.extra_seconds + price * self.nbytes


@dataclass(frozen=True, eq=False)
class Kept:
    """What one iteration keeps at some price.

    Attributes:
        body: forward and backward of an iteration.
        stacked_bytes: for the backward of each iteration, the carry included where that is read.
        transient_bytes: beside that, while one iteration runs.
        extra_seconds: of what an iteration computes again.
    """

    body: Lowered
    stacked_bytes: int
    transient_bytes: int
    extra_seconds: float


def kept_by_price(recorded: Recorded, shape: Shape) -> list[Kept]:
    """What an iteration may keep, from most to least; none that keeps more and takes longer than another."""
    tables, program = tables_of(recorded.program), recorded.program
    pricer = Pricer(tables)
    everything = frozenset(tables.droppable)
    keeps = dict.fromkeys([everything, *(pricer.keep(p) for p in pricer.prices(_PRICES)), frozenset[int]()])
    found = []
    for keep in keeps:
        body = Lowered(recorded, Schedule.from_order(program, unroll(program, keep)))
        timeline = simulate(program, body.schedule)
        carry = recorded.arguments[shape.n_consts : shape.n_consts + shape.n_carry]
        stacked = (*body.kept, *(c for c in carry if c in body.needed_later))
        size = sum(nbytes(recorded.graph.avals[v]) for v in stacked)
        found.append(Kept(body, size, timeline.peak_bytes - program.fixed_bytes, timeline.extra_seconds))
    found.sort(key=lambda k: (k.stacked_bytes, k.extra_seconds))
    best, least = list[Kept](), math.inf
    for kept in found:
        if kept.extra_seconds < least:
            best.append(kept)
            least = kept.extra_seconds
    return best


def choices_of(recorded: Recorded, shape: Shape) -> list[Choice]:
    """All that is worth choosing, the fewest bytes first: for every further byte, less time."""
    carry = sum(nbytes(a) for a in _carry_avals(recorded, shape))
    element = _element_bytes(recorded, shape)
    forward = sum(op.seconds for op in recorded.program.ops if op.phase == "forward")
    found = [
        Choice(
            segments, kept.body, _bytes_of(shape.length, segments, kept, carry, element),
            shape.length * (kept.extra_seconds + len(segments) * forward),
        )
        for kept in kept_by_price(recorded, shape)
        for segments in (ladders(shape.length) if _may_run_again(recorded) else [()])
    ]  # fmt: skip
    found.sort(key=lambda c: (c.nbytes, c.extra_seconds))
    best, least = list[Choice](), math.inf
    for choice in found:
        if choice.extra_seconds < least:
            best.append(choice)
            least = choice.extra_seconds
    return best


def _may_run_again(recorded: Recorded) -> bool:
    """Whether all of the body's forward may: else no segment does."""
    return all(op.once is None for op in recorded.program.ops if op.phase == "forward")


def _carry_avals(recorded: Recorded, shape: Shape) -> list[Any]:
    carry = recorded.arguments[shape.n_consts : shape.n_consts + shape.n_carry]
    return [recorded.graph.avals[v] for v in carry]


def _element_bytes(recorded: Recorded, shape: Shape) -> int:
    """Bytes of stacked arrays for one iteration's backward: elements, their cotangents, and those of results."""
    first = shape.n_consts + shape.n_carry
    elements = recorded.arguments[first:]
    wanted = [v for v, w in zip(elements, recorded.is_differentiated[first:], strict=True) if w]
    results = recorded.cotangents[sum(recorded.takes_cotangent[: shape.n_carry]) :]
    return sum(nbytes(recorded.graph.avals[v]) for v in (*elements, *wanted, *results))


def _bytes_of(length: int, segments: tuple[int, ...], kept: Kept, carry_bytes: int, element_bytes: int) -> int:
    """Bytes of a scan of this length: one carry for each segment, and what the longest segment takes.

    That has its part of the stacked arrays as arrays of its own. Where segments do not divide the length, all of the
    stacked arrays are copied, in two parts.
    """
    if not segments:
        return length * kept.stacked_bytes + kept.transient_bytes
    whole, rest = divmod(length, segments[0])
    copied = (length if rest else 0) + segments[0]
    inner = _bytes_of(segments[0], segments[1:], kept, carry_bytes, element_bytes)
    return (whole + bool(rest)) * carry_bytes + copied * element_bytes + inner


def ladders(length: int) -> Iterator[tuple[int, ...]]:
    """Lengths of segments to try: none; one level; two levels. Which is best depends on what carry and elements take.

    All there are of a short scan.
    """
    yield ()
    yield from ((first,) for first in _sizes(length, _ALL_OF_ONE))
    for first in _sizes(length, _ALL_OF_TWO):
        yield from ((first, second) for second in _sizes(first, _ALL_OF_TWO))


def _sizes(length: int, most: int) -> Sequence[int]:
    """Lengths of segments of which there are at least two: all, but of more than ``most`` iterations some.

    Those are the ones that divide it, some of every size, and those that leave as much on each level.
    """
    last = length // 2
    if length <= most:
        return range(2, last + 1)
    some = {round(_STEP**k) for k in range(1, math.ceil(math.log(last, _STEP)))}
    even = {math.ceil(length**power) for power in (1 / 3, 1 / 2, 2 / 3)}
    return sorted(d for d in {*some, *even, *_divisors(length)} if 2 <= d <= last)


def _divisors(length: int) -> set[int]:
    small = [d for d in range(1, math.isqrt(length) + 1) if length % d == 0]
    return {*small, *(length // d for d in small)}


def chosen(choices: Sequence[Choice], price: float) -> Choice:
    """The cheapest choice, where a byte costs so many seconds."""
    return min(choices, key=lambda c: (c.cost(price), c.nbytes))


def breakpoints(choices: Sequence[Choice]) -> list[float]:
    """Prices between which the same choice is the cheapest, ascending; a price for each of the choices that ever is."""
    hull = list[Choice]()
    for choice in choices:  # bytes ascend, seconds descend
        while len(hull) > 1 and _price_between(hull[-2], hull[-1]) <= _price_between(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    edges = [_price_between(a, b) for a, b in pairwise(hull)]
    return sorted(edge * (1 + 1e-9) for edge in edges)


def _price_between(smaller: Choice, larger: Choice) -> float:
    """The price at which both cost the same."""
    return (smaller.extra_seconds - larger.extra_seconds) / (larger.nbytes - smaller.nbytes)
