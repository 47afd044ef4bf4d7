"""Plans for programs that repeat themselves.

Planning takes a time that does not depend on how often they do.

A plan says what every repetition keeps. Repetitions at the front keep one set of their values, those at the end
another, larger one: the backward begins at the end, and what the last ones keep has left by the time the first ones
need room to run again. So a plan is two kinds of repetition and two counts. Every byte of it, and every second, grows
by the same amount with each further repetition of a kind; so four of each kind, and one more of either, tell the peak
and the extra time of any number of them, exactly (``Model``).

The kinds come from minimum cuts at a grid of prices and segmentations (``min_cut``) of a program with a few
repetitions. Where memory is short, 4, 16, ... repetitions are one: what crosses from one group to the next is kept then
(Chen et al. 2016), so that the floor is about the square root of the number. The bound is Lagrange's, of the moment at
which the backward begins: groups of repetitions that get what others make for nothing have the same minimum cut each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from autoremat.planner import clock
from autoremat.planner.bounds.repeated import repeated_bound
from autoremat.planner.search.calls import folded_of, planned_as, unfolded
from autoremat.planner.search.memo import per_program
from autoremat.planner.search.min_cut import Pricer
from autoremat.planner.search.search import Search
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.planner.solvers.segments import boundaries
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule
from autoremat.program.repeats import Layout, Repeated, Written, counterparts, fold, with_times, written_out
from autoremat.program.units import parse_budget

_EACH: Final = 4
"""Repetitions of each kind that are looked at."""

_EDGE: Final = 2
"""Of those so many at either end are unlike the others."""

_FEW: Final = 6
"""Repetitions of the program that the kinds come from."""

_PRICES: Final = 10
_LARGE, _LARGER, _LARGEST = 1500, 20_000, 60_000
"""Ops of the programs that are looked at: beyond the first number fewer kinds are, beyond the second only if nothing
has been found yet, beyond the third none."""

_TOO_MUCH: Final = 1 << 60
"""Added to the bytes of what the engine cannot run."""

_REFINED: Final = 4
"""How often kinds between the two of the best mixture are looked for."""

ENOUGH: Final = 0.003
"""The gap to the bound at which larger groups are not looked at."""

Keep = frozenset[int]


@dataclass(frozen=True)
class Span:
    """Repetitions, one after the other, that keep the same.

    Values are given by their index in the folded program.
    """

    keep: Keep
    count: int


@dataclass(frozen=True)
class RepeatedPlan:
    """What each repetition keeps, so that the peak stays within the budget.

    Attributes:
        folded: the program; its repetitions may be several of those that were asked about, as one.
        spans: what the repetitions keep, first ones first.
        budget_bytes: the budget asked for.
        peak_bytes: the peak.
        plain_peak_bytes: the peak without any rerun.
        overhead: extra seconds as a fraction of the plain program's.
        lower_bound: an overhead below which no schedule within this budget can go.
    """

    folded: Repeated
    spans: tuple[Span, ...]
    budget_bytes: int
    peak_bytes: int
    plain_peak_bytes: int
    overhead: float
    lower_bound: float

    def unfold(self) -> Plan:
        """Write out the plan with its program, run by run.

        O(reads of all repetitions).
        """
        written = written_out(self.folded.program, self.folded.layout, self.folded.times)
        schedule = _schedule(written.program, _kept(written, self.folded, self.spans))
        return Plan(
            written.program, schedule, self.budget_bytes, self.peak_bytes, self.plain_peak_bytes, self.peak_bytes,
            self.overhead, self.lower_bound, "repeated",
        )  # fmt: skip

    def __str__(self) -> str:
        """Describe the plan in a few lines."""
        ops, mb = f"{self.folded.ops:,} ops", 1e6
        lines = [f"{self.folded.program.name}: {ops}, {self.folded.times:,} repetitions"]
        lines.append(f"  peak {self.peak_bytes / mb:,.1f} MB of {self.budget_bytes / mb:,.1f}, "
                     f"plainly {self.plain_peak_bytes / mb:,.1f}")  # fmt: skip
        lines.append(f"  {self.overhead:.2%} extra time; no plan takes less than {self.lower_bound:.2%}")
        lines += [f"  {span.count:,} repetitions keep {len(span.keep)} values each" for span in self.spans]
        return "\n".join(lines)


@per_program
def folded_for_planning(program: Program) -> Repeated | None:
    """Fold a program, if a quarter of its ops or less remains.

    This is looked for once.
    """
    folded = fold(program)
    return folded if folded and 4 * len(folded.program.ops) <= len(program.ops) else None


def solve_repeated(folded: Repeated, budget: int | float | str) -> RepeatedPlan:
    """Find the fastest known plan for any number of repetitions.

    It is the one with the least extra time.

    Args:
        folded: as ``autoremat.program.fold`` makes it.
        budget: as for ``solve``.

    Raises:
        InfeasibleBudget: nothing that is known fits.
    """
    plain = plain_peak_of(folded)
    budget_bytes = parse_budget(budget, plain)
    bound = repeated_bound(folded, budget_bytes)
    best: RepeatedPlan | None = None
    lowest = plain
    for grouped, is_larger in _groupings(folded):
        if best and is_larger:
            break
        kinds = _Kinds(grouped)
        mixture = kinds.best(budget_bytes)
        lowest = min(lowest, kinds.lowest_bytes)
        if mixture is not None:
            model, counts = mixture
            overhead = model.extra_seconds(*counts) / _seconds(grouped)
            if best is None or overhead < best.overhead:
                spans = tuple(Span(k, n) for k, n in zip(model.kinds, counts, strict=True) if n)
                peak = model.peak_bytes(*counts)
                best = RepeatedPlan(grouped, spans, budget_bytes, peak, plain, overhead, min(bound, overhead))
        if (best and best.overhead <= bound + ENOUGH) or clock.is_over():
            break
    if best is None:
        text = f"budget of {budget_bytes} bytes: the lowest peak that is known takes {lowest}; use at least that"
        raise InfeasibleBudget(text, budget_bytes=budget_bytes, floor_bytes=lowest)
    return best


def _groupings(folded: Repeated) -> Iterator[tuple[Repeated, bool]]:
    """Yield the program with 1, 4, 16, ... repetitions as one.

    With each comes whether it takes long to look at.
    """
    yield folded, False
    size, each = 4, folded.layout.forward[1] + folded.layout.backward[1]
    while size <= 2 * isqrt(folded.times) and 2 * _EACH * size * each <= _LARGEST:
        rest = folded.times % size
        if folded.times // size < 2 * _EACH:
            return
        program, layout = with_times(folded.program, folded.layout, _FEW * size + rest)
        yield Repeated(program, layout.grouped(size), folded.times // size), 2 * _EACH * size * each > _LARGER
        size *= 4


@dataclass(frozen=True, eq=False)
class Model:
    """Peak and extra time of two kinds of repetition, any counts.

    Attributes:
        kinds: what they keep.
        counts: of either kind, where it was looked at.
        base: for every op that is unlike the others the most bytes while it runs, at these counts.
        steps: what a further repetition of either kind adds to each.
        seconds: extra seconds at these counts, and what a further one of either adds.
    """

    kinds: tuple[Keep, Keep]
    counts: tuple[int, int]
    base: npt.NDArray[np.int64]
    steps: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    seconds: tuple[float, float, float]

    def peak_bytes(self, first: int, second: int = 0) -> int:
        """Compute the peak with so many repetitions of either kind."""
        a, b = self._further(first, second)
        return int((self.base + a * self.steps[0] + b * self.steps[1]).max())

    def extra_seconds(self, first: int, second: int = 0) -> float:
        """Seconds of their reruns."""
        a, b = self._further(first, second)
        seconds, more, more_too = self.seconds
        return max(0.0, seconds + a * more + b * more_too)

    def _further(self, first: int, second: int) -> tuple[int, int]:
        """Count the repetitions beyond those that were looked at.

        Where both kinds are the same one, all of them are of the first.
        """
        if self.kinds[0] == self.kinds[1]:
            return first + second - sum(self.counts), 0
        return first - self.counts[0], second - self.counts[1]


class _Kinds:
    """What repetitions of one program may keep."""

    def __init__(self, folded: Repeated) -> None:
        self.folded = folded
        self._few = _written(folded, _FEW)
        self._looks: dict[int, _Look] = {}
        self._tables = tables_of(planned_as(self._few.program))
        self._is_large = len(self._few.program.ops) > _LARGE
        self._pricer = Pricer(self._tables)
        self._cuts = self._segmentations()
        everything = self._in_folded(self._few, frozenset(self._tables.droppable))
        self._alone = {everything: self.model(everything, everything)}
        """A model for each kind alone."""
        for price in self._pricer.prices(3 if self._is_large else _PRICES):
            self._add(price)

    @property
    def lowest_bytes(self) -> int:
        """The lowest peak that is known."""
        return min(m.peak_bytes(self.folded.times) for m in self._alone.values())

    def best(self, budget_bytes: int) -> tuple[Model, tuple[int, int]] | None:
        """Find the mixture with the fewest seconds that fits.

        Kinds between the two of it are looked for, too.
        """
        best = self._best_known(budget_bytes)
        for _ in range(_REFINED):
            if best is None or best[1][1] == 0:
                break
            small, large = (self._alone[keep] for keep in best[0].kinds)
            n = self.folded.times
            more, fewer = large.peak_bytes(n) - small.peak_bytes(n), small.extra_seconds(n) - large.extra_seconds(n)
            if more <= 0 or fewer <= 0 or not self._add(fewer / more):
                break
            best = self._best_known(budget_bytes)
        return best

    def _best_known(self, budget_bytes: int) -> tuple[Model, tuple[int, int]] | None:
        fit = self._mixtures(budget_bytes)
        return min(fit, key=lambda m: m[0].extra_seconds(*m[1]), default=None)

    def _frontier(self) -> list[Model]:
        """List the kinds that, alone, no other beats, by rising peak."""
        n, found = self.folded.times, list[Model]()
        for model in sorted(self._alone.values(), key=lambda m: (m.peak_bytes(n), m.extra_seconds(n))):
            if not found or model.extra_seconds(n) < found[-1].extra_seconds(n) - 1e-12:
                found.append(model)
        return found

    def _mixtures(self, budget_bytes: int) -> Iterator[tuple[Model, tuple[int, int]]]:
        """Yield models and counts that fit.

        They are of one kind alone, and of pairs of kinds around the budget.
        """
        times, frontier = self.folded.times, self._frontier()
        fit = [m for m in frontier if m.peak_bytes(times) <= budget_bytes]
        yield from ((m, (times, 0)) for m in fit[-1:])
        above = [m for m in frontier if m.peak_bytes(times) > budget_bytes]
        for small in fit[-3:]:
            for large in above[:4]:
                yield from self._fitting((small.kinds[0], large.kinds[0]), budget_bytes)

    def _fitting(self, kinds: tuple[Keep, Keep], budget_bytes: int) -> Iterator[tuple[Model, tuple[int, int]]]:
        """Yield the pair with most repetitions of the second kind that fit.

        With none of them it fits, and the peak is the largest of many straight lines in their number. So where some do
        not fit, more do not either.
        """
        times, model = self.folded.times, self.model(*kinds)
        most = _most(lambda n: model.peak_bytes(times - n, n) <= budget_bytes, times - _EACH)
        if most >= _EACH:
            yield model, (times - most, most)
            return
        for n in range(_EACH - 1, 0, -1):
            model = self.model(*kinds, n)
            if model.peak_bytes(times - n, n) <= budget_bytes:
                yield model, (times - n, n)
                return

    def _add(self, price: float) -> bool:
        """Add the kinds of a price; whether one is new."""
        found = {self._in_folded(self._few, self._pricer.keep(price, cut)) for cut in self._cuts} - self._alone.keys()
        self._alone.update((keep, self.model(keep, keep)) for keep in sorted(found, key=sorted))
        return bool(found)

    def model(self, first: Keep, second: Keep, of_second: int = _EACH) -> Model:
        """Make the model of two kinds.

        Of the second a count below ``_EACH`` is meant as it is.
        """
        n = _EACH + of_second
        base, seconds = self._look(n).at(first, second, _EACH)
        more, longer = self._look(n + 1).at(first, second, _EACH + 1)
        more_too, longer_too = self._look(n + 1).at(first, second, _EACH) if of_second == _EACH else (more, longer)
        steps = more - base, more_too - base
        costs = seconds, longer - seconds, longer_too - seconds
        return Model((first, second), (_EACH, of_second), base, steps, costs)

    def _look(self, n: int) -> _Look:
        if n not in self._looks:
            self._looks[n] = _Look(self.folded, n)
        return self._looks[n]

    def _segmentations(self) -> list[tuple[int, ...]]:
        """Segments: each repetition, shares of one, and everything."""
        program, layout = self._few.program, self._few.layout
        begins = [layout.forward[0] + k * layout.forward[1] for k in range(layout.count)]
        blocks = {self._stage(program, i) for i in begins}
        parts = (1, 2) if self._is_large else (1, 2, 3, 4, 6, 8, 12)
        inner = [boundaries(self._tables, n * layout.count) for n in parts]
        cuts = [() if self._is_large else tuple(sorted(blocks)), *(tuple(sorted({*blocks, *cut})) for cut in inner)]
        return list(dict.fromkeys([*cuts, ()]))

    @staticmethod
    def _stage(program: Program, op: int) -> int:
        """Find the op of ``planned_as(program)`` that has this op.

        It begins with this op or goes on with it.
        """
        if not program.has_calls:
            return op
        return bisect_left([stage.end for stage in folded_of(program).stages], op)

    def _in_folded(self, few: Written, keep: Keep) -> Keep:
        """Give the values kept the numbers of the folded program.

        A repetition in the middle speaks for all.
        """
        same = counterparts(self.folded.program, self.folded.layout)
        places = (few.values[n] for n in keep)
        return frozenset(v if k < 0 else same[v] for k, v in places if k in (-1, few.layout.middle))


class _Look:
    """Bytes, op by op, of a program with few repetitions.

    They are of two kinds.
    """

    def __init__(self, folded: Repeated, count: int) -> None:
        self.folded, self.count = folded, count
        self.written = _written(folded, count)
        self.search = Search(self.written.program)

    def at(self, first: Keep, second: Keep, firsts: int) -> tuple[npt.NDArray[np.int64], float]:
        """Find the most bytes of each op, and the extra seconds.

        Ops are those that are unlike the others.
        """
        spans = (Span(first, firsts), Span(second, self.count - firsts))
        candidate = self.search.keeping("repeated", _kept(self.written, self.folded, spans))
        account = candidate.account
        keys, number = self._keys(firsts)
        found = np.zeros(number + 1, dtype=np.int64)
        np.maximum.at(found, keys[account.progress], account.during)
        return found[:-1] if candidate.can_run else found[:-1] + _TOO_MUCH, account.extra_seconds

    @lru_cache(maxsize=4)  # noqa: B019 - as long as the look
    def _keys(self, firsts: int) -> tuple[npt.NDArray[np.int64], int]:
        """Number every op of the planned program.

        The number is that among the ops that are unlike the others; the last one stands for none of them.
        """
        program = self.written.program
        planned = planned_as(program)
        begins = [s.begin for s in folded_of(program).stages] if program.has_calls else range(len(planned.ops))
        each = len(self.folded.program.ops)
        number = each * (1 + 4 * _EDGE)
        keys = [
            number if (edge := self._edge(self.written.ops[i][0], firsts)) is None
            else edge * each + self._within(i) for i in begins
        ]  # fmt: skip
        return np.array(keys, dtype=np.int64), number

    def _within(self, i: int) -> int:
        """Find the op in the folded program.

        It is that of the first repetition, also for an op of one in the middle.
        """
        return _anchor(self.folded.layout, self.written.ops[i][1])

    def _edge(self, k: int, firsts: int) -> int | None:
        """Number a repetition among those that are unlike the others.

        None for one that is not among them; 0 outside of all repetitions.
        """
        if k < 0:
            return 0
        second = k >= firsts
        position, length = (k - firsts, self.count - firsts) if second else (k, firsts)
        from_end = length - position
        if position < _EDGE:
            return 1 + 2 * _EDGE * second + position
        return 1 + 2 * _EDGE * second + 2 * _EDGE - from_end if from_end <= _EDGE else None


def _anchor(layout: Layout, op: int) -> int:
    """Find the same op of the first repetition."""
    k = layout.repetition_of(op)
    if k < 0:
        return op
    is_forward = op < layout.forward[0] + layout.forward[1] * layout.count
    return op - k * layout.forward[1] if is_forward else op + k * layout.backward[1]


def _written(folded: Repeated, times: int) -> Written:
    return written_out(folded.program, folded.layout, times)


def _kept(written: Written, folded: Repeated, spans: tuple[Span, ...]) -> Keep:
    """Find the values that the spans keep in a written program.

    It has as many repetitions as the spans.
    """
    kinds = [span.keep for span in spans for _ in range(span.count)]
    begin = folded.layout.forward[0]
    producer = folded.program.producer
    same = counterparts(folded.program, folded.layout)
    kept = set[int]()
    for n, (k, v) in enumerate(written.values):
        kind = kinds[k] if k >= 0 else spans[0 if producer[v] < begin else -1].keep
        if same[v] in kind:
            kept.add(n)
    return frozenset(kept)


def _seconds(folded: Repeated) -> float:
    """Seconds of the plain program with all repetitions."""
    few = folded.program
    (begin, size), (later, length) = folded.layout.forward, folded.layout.backward
    each = sum(op.seconds for op in (*few.ops[begin : begin + size], *few.ops[later : later + length]))
    return few.seconds + (folded.times - folded.layout.count) * each


def plain_peak_of(folded: Repeated) -> int:
    """Compute the peak of the plain program with all repetitions.

    It is that of a few, and what each further one adds.
    """
    everything = frozenset(range(len(folded.program.values)))
    looks = [_Look(folded, 2 * _EACH + more).at(everything, everything, _EACH + more)[0] for more in (0, 1)]
    return int((looks[0] + (folded.times - 2 * _EACH) * (looks[1] - looks[0])).max())


def _schedule(program: Program, keep: Keep) -> Schedule:
    planned = planned_as(program)
    return unfolded(program, Schedule.from_order(planned, unroll(planned, keep)))


def _most(fits: Any, most: int) -> int:
    """Find the largest number up to ``most`` that fits.

    Smaller ones fit as well; -1 for none.
    """
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
