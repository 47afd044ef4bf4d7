"""Simulated annealing on retention intervals: on any graph, near the floor, in steps that can be counted.

One step changes the set of further runs: it drops a value from memory until its next use, keeps one through, or makes
one again earlier or later. What exceeds the budget costs a price per byte and run: a Lagrange multiplier that is
steered. For most of the search a share of the runs is to exceed the budget, fewer and fewer of them. Were none to, the
price of a large program would be so high that hardly anything could change, because some of a thousand runs nearly
always exceed it. In the last part all of them have to fit, and the cheapest set that does remains.
Annealing over retention intervals is that of FastSA (Imanishi et al. 2023, "A fast heuristic to optimize time-space
tradeoff for large models", NeurIPS).

Time plays no part: a step count and a seed decide, and the same ones find the same on every machine.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from math import log

from autoremat.planner import clock
from autoremat.planner.search.retention import Retention, Runs

STEPS_A_SECOND = 25_000
"""Steps that count as a second of work."""

_BATCH = 250
"""Steps from one look at temperature and price to the next."""

_TRIES, _COMPARED = 12, 2
"""How many values are drawn to find one that lies idle; of how many the one that frees the most per second leaves."""

_DEEP = 3
"""How far the sources of a value that is made again are made again with it at once, and how often:"""

_ALONG = 0.15

_LEAST_TURN, _RISE, _RISEN = 1.08, 300.0, 0.3
"""The price changes by that factor after a batch; in a short search by more, so that it can rise so many times in so
large a part of it."""

_LEAST_ABOVE = 0.8
"""The price falls where fewer runs exceed the budget than this share of those that may."""

_LAST = 0.15
"""The part of a search, its last, in which all runs have to fit; in half of it the price can rise ``_RISE`` times."""

_DEAREST = 1e6
"""The price beyond which nothing changes any more, in the price of a mean byte."""


@dataclass(frozen=True)
class Course:
    """How a search cools down.

    Attributes:
        steps: in all.
        seed: of the dice.
        hot, cold: first and last temperature, in mean seconds of an op.
        price: of a byte and run above the budget, at first, in mean seconds of an op over mean bytes of a value.
        above: the share of the runs that may exceed the budget at first; 0: all have to fit all the time.
    """

    steps: int
    seed: int = 0
    hot: float = 1.0
    cold: float = 0.02
    price: float = 0.01
    above: float = 0.1

    def turn(self, done: int) -> float:
        """By how much the price turns after a batch."""
        part = _RISEN if done < self._loose_steps or not self.above else _LAST / 2
        return max(_LEAST_TURN, float(_RISE ** (_BATCH / max(_BATCH, part * self.steps))))

    def heat(self, done: int) -> float:
        """The temperature after so many steps, in mean seconds of an op."""
        return float(self.hot * (self.cold / self.hot) ** (done / self.steps))

    def share_above(self, done: int) -> float:
        """The share of the runs that may exceed the budget after so many steps."""
        return self.above * max(0.0, 1.0 - done / self._loose_steps)

    @property
    def _loose_steps(self) -> float:
        return (1.0 - _LAST) * self.steps


@dataclass(frozen=True)
class Annealed:
    """What a search has found: the cheapest further runs within the budget, None where there were none."""

    runs: Runs | None
    extra_seconds: float
    steps: int


class Annealing:
    """One search from one start.

    Args:
        state: the start; is changed.
        course: how to cool down.

    Attributes:
        best: what is known by now.
    """

    def __init__(self, state: Retention, course: Course) -> None:
        self._state, self._course = state, course
        self._rnd = random.Random(course.seed).random
        facts, n = state.facts, max(1, state.n)
        self._unit = sum(facts.seconds) / n or 1.0
        self._dear = self._unit / (sum(facts.nbytes) / max(1, len(facts.nbytes)) or 1.0)
        self._price = course.price * self._dear
        self.best = Annealed(None, float("inf"), 0)

    def run(self, enough: Callable[[], bool]) -> Annealed:
        """All steps, or until it is enough, which is asked after every batch. O(runs) array operations each."""
        course, done = self._course, 0
        while done < course.steps and not enough():
            within = self._batch(course.heat(done) * self._unit)
            self._price *= course.turn(done) ** self._direction(within, course.share_above(done))
            done += _BATCH
            clock.spend(_BATCH / STEPS_A_SECOND)
        return Annealed(self.best.runs, self.best.extra_seconds, done)

    def _direction(self, within: float, most_above: float) -> int:
        """Whether the price is to rise (1) or to fall (-1), after a batch part of whose steps was within the budget."""
        if most_above:
            above = len(self._state.keys_above) / len(self._state.keys)
            return 1 if above > most_above else -(above < _LEAST_ABOVE * most_above)
        if within < 0.2:
            return int(self._price < _DEAREST * self._dear)
        return -(within > 0.5)

    def fits(self) -> bool:
        """Whether something within the budget has been found."""
        return self.best.runs is not None

    def _batch(self, heat: float) -> float:
        """Some steps at one temperature and price; the share of them that were within the budget."""
        state, rnd, price, within = self._state, self._rnd, self._price, 0
        excess = state.excess_bytes
        for _ in range(_BATCH):
            most = -heat * log(1.0 - rnd())  # Metropolis' rule, with the dice cast ahead of the change
            self._change(excess)
            draft = state.draft
            if draft.changes and draft.seconds - price * excess <= most:
                change = state.excess_change()
                if draft.seconds + price * change <= most:
                    state.settle()
                    excess += change
                    if not excess:
                        self._note()
            if state.draft.changes or state.draft.spans:
                state.take_back()
            within += not excess
        return within / _BATCH

    def _note(self) -> None:
        if self._state.extra_seconds < self.best.extra_seconds * (1 - 1e-12):
            self.best = Annealed(self._state.runs, self._state.extra_seconds, 0)

    # -- changes -------------------------------------------------------------------------------------------------------

    def _change(self, excess: int) -> None:
        draw = self._rnd()
        if draw < 0.4 or not self._state.again.keys:
            key = self._idle(self._moment(excess))
            if key >= 0:
                self._drop(key, _DEEP)
        elif draw < 0.7:
            self._keep(self._one_again())
        else:
            self._move(self._one_again())

    def _moment(self, excess: int) -> int:
        """The key of a run, mostly of one above the budget."""
        state, rnd = self._state, self._rnd
        keys = state.keys_above if excess and rnd() < 0.7 else state.keys
        return keys[int(rnd() * len(keys))]

    def _one_again(self) -> int:
        """One of the further runs."""
        again = self._state.again.keys
        return again[int(self._rnd() * len(again))]

    def _idle(self, moment: int) -> int:
        """The further run that lets a value go which is in memory at a moment without being used; -1: none found."""
        rnd, facts, latest = self._rnd, self._state.facts, moment // self._state.n
        best, most, compared = -1, -1.0, 0
        for _ in range(_TRIES):
            i = int(rnd() * latest)
            key, span = self._return(i, moment)
            if key >= 0:
                freed = span * facts.nbytes[facts.writes[i][0]] / (facts.seconds[i] or 1e-12)
                if freed > most:
                    best, most = key, freed
                compared += 1
                if compared == _COMPARED:
                    break
        return best

    def _return(self, i: int, moment: int) -> tuple[int, int]:
        """The further run of op ``i`` for the next use after a moment at which its value lies idle, and how long."""
        state = self._state
        n, after = state.n, state.facts.after[i]
        if after >= n:
            return -1, 0
        found = state.accesses[state.facts.writes[i][0]]
        p = bisect_left(found, moment)
        if not 0 < p < len(found) or found[p] == moment or found[p] % n == i:
            return -1, 0
        late = found[p] // n
        key = late * n + i
        return (key, late - found[p - 1] // n) if late > after and key > found[p - 1] else (-1, 0)

    def _drop(self, key: int, depth: int) -> None:
        """Have a further run, and now and then of what it reads and would have to stay for it."""
        state, late = self._state, key // self._state.n
        state.add(key)
        for v in state.facts.reads[key % state.n] if depth else ():
            i, found = state.facts.producer[v], state.accesses[v]
            source = late * state.n + i
            p = bisect_left(found, key)
            may_run = late > state.facts.after[i] and source > found[p - 1] and not state.lasts(v, key)
            if may_run and self._rnd() < _ALONG:
                self._drop(source, depth - 1)

    def _keep(self, key: int) -> None:
        """Take a further run back, and those that only fed it."""
        state, n = self._state, self._state.n
        state.remove(key)
        for v in state.facts.reads[key % n]:
            found = state.accesses[v]
            maker = found[bisect_left(found, key) - 1]
            i = maker % n
            is_made_again = i == state.facts.producer[v] and state.is_again(maker)
            if is_made_again and not any(state.lasts(w, maker) for w in state.facts.writes[i]):
                self._keep(maker)

    def _move(self, key: int) -> None:
        """Make a value again for another of its uses: an earlier one, or a later one, kept up to the one before."""
        state, n, i = self._state, self._state.n, key % self._state.n
        found = state.accesses[state.facts.writes[i][0]]
        p = bisect_left(found, key)
        near = (found[q] for q in (p - 1, p + 1, p + 2) if q < len(found))
        lates = [k // n for k in near if k % n != i and k // n > state.facts.after[i] and k // n != key // n]
        if lates:
            late = lates[int(self._rnd() * len(lates))]
            self._keep(key)
            there, q = late * n + i, bisect_left(found, late * n + i)
            if q == len(found) or found[q] != there:
                self._drop(there, _DEEP)
