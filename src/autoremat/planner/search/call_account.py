"""Bytes of an order of a folded program's runs, as the program's own ops have them: ``simulate`` on arrays.

The planners order the runs of stages (``calls``). What a schedule takes is decided by the ops: of a call that runs
again every value is there once more, as long as C++ keeps it, and what an earlier block left for later can be used. So
every order is laid out op by op and accounted for there; the account is told run by run of the folded program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autoremat.planner.search.account import Account, Accountant, Ints, prolonged
from autoremat.planner.search.calls import Folded, program_of
from autoremat.program import Program

Bools = npt.NDArray[np.bool_]


def accountant_of(planned: Program) -> Accountant:
    """The accountant for what planners work on: of a folded program the one that knows its bytes exactly."""
    program = program_of(planned) if isinstance(planned, Folded) else None
    return CallAccountant(program, planned) if program and isinstance(planned, Folded) else Accountant(planned)


@dataclass(frozen=True, eq=False)
class _Layout:
    """An order of the folded program, op by op.

    Attributes:
        folded: the order itself.
        order: op of the program of every run.
        home: for every run that of the folded order which it belongs to.
        again: whether the op has run before.
        end: for every run the last one of the same block.
        stands_for: for every run of the folded order the one that does its work: the next one, where that is a longer
            prefix of the same call.
    """

    folded: Ints
    order: Ints
    home: Ints
    again: Bools
    end: Ints
    stands_for: Ints


class CallAccountant(Accountant):
    """``Accountant`` of a program by way of its folded program: called with orders of the latter."""

    def __init__(self, program: Program, folded: Folded) -> None:
        super().__init__(program)
        self.n_ordered = len(folded.ops)
        begin, producer = (np.array(x, dtype=np.int64) for x in (program.call_begin, program.producer))
        self._call_of = begin
        self._made_in = np.where(producer >= 0, begin[producer], -1)
        self._available = np.array(program.available, dtype=np.int64)
        self._stages = np.array([(s.call_begin, s.begin, s.end) for s in folded.stages], dtype=np.int64)
        self._home = np.array(folded.producer, dtype=np.int64)

    def __call__(self, order: Ints) -> Account:
        """Bytes and residencies of the order of the folded program."""
        return self._account(order, byproducts=False)

    def with_byproducts(self, order: Ints) -> Account:
        """The same, with the copies that a call makes on the way and that could be kept."""
        return self._account(order, byproducts=True)

    def extra_seconds_of(self, order: Ints) -> float:
        """Seconds of the reruns of an order of the folded program."""
        return self._extra_seconds(self._lay_out(order).order)

    def _account(self, order: Ints, *, byproducts: bool) -> Account:
        layout = self._lay_out(order)
        value, run, written = self._accesses(layout.order)
        op, block_end = layout.order[run], layout.end[run]
        held = run + np.clip(self.hold[value] - op, 0, block_end - run)
        inner = layout.again[run] & (self._made_in[value] == self._call_of[op])
        inner &= self._available[value] > layout.order[block_end]
        lasting = _copies(*(x[~inner] for x in (value, run, held, written)))
        passing = _copies(*(x[inner] for x in (value, run, held, written)))
        twice = layout.end[lasting.start]
        accesses = value[~inner], lasting.run, np.flatnonzero(lasting.written)
        end = prolonged(lasting.value, lasting.end, twice, self.held_until(layout.order, *accesses))
        lasting = replace(lasting, end=end)
        during = self._during(layout, lasting, passing)
        starts = np.flatnonzero(np.diff(layout.home, prepend=-1))
        most = np.zeros(len(order), dtype=np.int64)
        most[layout.home[starts]] = np.maximum.reduceat(during, starts)
        extra = self._extra_seconds(layout.order)
        return self._told_by_stages(layout, lasting, most[layout.stands_for], extra, byproducts=byproducts)

    def _lay_out(self, order: Ints) -> _Layout:
        m, again = len(order), self._are_again(order)
        call, begin, last = self._stages[order].T
        joined = again[:-1] & again[1:] & (call[:-1] == call[1:]) & (order[:-1] < order[1:])
        absorbed = np.append(joined, False)
        begin = np.where(again, call, begin)
        count = np.where(absorbed, 0, last - begin + 1)
        ends = np.cumsum(count)
        home = np.repeat(np.arange(m), count)
        position = np.arange(len(home))
        stay = np.flatnonzero(~absorbed)
        return _Layout(
            folded=order,
            order=position + np.repeat(begin - (ends - count), count),
            home=home,
            again=again[home],
            end=np.where(again[home], ends[home] - 1, position),
            stands_for=stay[np.searchsorted(stay, np.arange(m))],
        )

    def _during(self, layout: _Layout, lasting: _Copies, passing: _Copies) -> Ints:
        """Bytes while each op runs."""
        m, order = len(layout.order), layout.order
        covered = _covered(lasting, passing, m)
        passing = replace(passing, end=np.where(covered, layout.end[passing.start], passing.end))
        owner, start, end = (np.concatenate(pair) for pair in zip(lasting.span, passing.span, strict=True))
        nbytes = self.nbytes[owner].astype(np.float64)
        steps = np.bincount(start, nbytes, m + 1) - np.bincount(end + 1, nbytes, m + 1)
        during: Ints = np.cumsum(steps[:m]).astype(np.int64) + self._scratch_of(order) + self.fixed_bytes
        leaving = np.concatenate([np.ones(len(lasting.value), dtype=bool), ~covered])
        self._take_over(order, during, owner[leaving], end[leaving])
        return during

    def _told_by_stages(
        self, layout: _Layout, copies: _Copies, during: Ints, extra_seconds: float, *, byproducts: bool
    ) -> Account:
        """The account by runs of the folded order; of by-products that nothing reads only if they are asked for."""
        home = layout.home
        start, access = home[copies.start], home[copies.run]
        owner = np.cumsum(copies.written) - 1
        told = copies.written | ((access != start[owner]) & (access != np.append(-1, access[:-1])))
        known = self._home[copies.value] >= 0
        if not byproducts:
            uses = np.bincount(owner[told], minlength=len(start))
            known &= (uses > 1) | ~layout.again[copies.start] | (layout.folded[start] == self._home[copies.value])
        told &= known[owner]
        return Account(
            layout.folded,
            during,
            copies.value[known],
            start[known],
            home[copies.end][known],
            np.flatnonzero(copies.written[told]),
            access[told],
            extra_seconds,
        )


@dataclass(frozen=True, eq=False)
class _Copies:
    """Residencies of values: which value, from which run to which; ``run`` and ``written`` of all their accesses."""

    value: Ints
    start: Ints
    end: Ints
    run: Ints
    written: Bools

    @property
    def span(self) -> tuple[Ints, Ints, Ints]:
        """Value, first and last run."""
        return self.value, self.start, self.end


def _copies(value: Ints, run: Ints, held: Ints, written: Bools) -> _Copies:
    """The residencies of accesses sorted by value and run; each ends where the last access ends that holds it."""
    first = np.flatnonzero(written)
    end = np.maximum.reduceat(held, first) if len(first) else held[:0]
    return _Copies(value[first], run[first], end, run, written)


def _covered(lasting: _Copies, passing: _Copies, m: int) -> Bools:
    """For every copy that passes whether a lasting one of the same value is in memory beside it."""
    if not len(lasting.value):
        return np.zeros(len(passing.value), dtype=bool)
    keys = lasting.value * m + lasting.start
    k = np.searchsorted(keys, passing.value * m + passing.start, side="right") - 1
    at = np.maximum(k, 0)
    covered: Bools = (k >= 0) & (lasting.value[at] == passing.value) & (lasting.end[at] >= passing.start)
    return covered
