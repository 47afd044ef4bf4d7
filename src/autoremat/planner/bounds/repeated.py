"""The bound of a program that repeats itself, in a time that does not depend on how often.

It is Lagrange's, of one moment (``bounds``). Repetitions are taken in groups, and each group is given what the others
make for nothing: that can only make the minimum cut smaller, and then the groups have nothing to do with each other and
are all alike. So the cut of one group counts as often as there are groups; repetitions that are left over are a smaller
group. What is in memory whatever is decided grows by the same amount with each repetition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from autoremat.planner.bounds.bounds import _Moment, next_price
from autoremat.planner.search.min_cut import Network, build
from autoremat.program import Program, simulate
from autoremat.program.repeats import Layout, Repeated, with_times

_AROUND: Final = 2
"""Repetitions at either end that are in no group with others."""

_GROUP, _LARGEST = 24, 20_000
"""Repetitions of a group, and ops of the program that is looked at, at most."""

_STEPS: Final = 40


def repeated_bound(folded: Repeated, budget_bytes: int) -> float:
    """A share of the seconds below which the extra time of no schedule within the budget can be."""
    each = folded.layout.forward[1] + folded.layout.backward[1]
    size = max(1, min(_GROUP, folded.times - 2 * _AROUND, _LARGEST // each - 2 * _AROUND))
    if folded.times < 2 * _AROUND + 2:
        return 0.0
    few = with_times(folded.program, folded.layout, 2 * _AROUND + size)
    more = with_times(folded.program, folded.layout, 2 * _AROUND + size + 1)
    further = folded.times - few[1].count
    seconds = few[0].seconds + further * (more[0].seconds - few[0].seconds)
    if seconds <= 0:
        return 0.0
    return max(0.0, *(_at(folded, few, more, place, budget_bytes) for place in _moments(*few))) / seconds * (1 - 1e-12)


def _moments(program: Program, layout: Layout) -> list[int]:
    """Ops between the last forward and the first backward repetition: the fullest, and the first of the backward."""
    begin = layout.forward[0] + layout.forward[1] * layout.count
    end = layout.backward[0] if layout.backward[1] else len(program.ops)
    full = simulate(program).resident_bytes
    between = range(begin, min(end + 1, len(program.ops)))
    first = next((i for i in between if program.ops[i].phase == "backward"), begin)
    return sorted({max(between, key=full.__getitem__), min(first, len(program.ops) - 1)}) if between else []


@dataclass(frozen=True)
class _Group:
    """So many equal networks with this one, and bytes and seconds of its program."""

    network: Network
    count: int
    nbytes: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]

    def cost(self, price: float) -> tuple[float, float]:
        """The minimum cut at a price, and its bytes."""
        if not self.network.edges or not self.count:
            return 0.0, 0.0
        cut = self.network.solve(price, self.nbytes, self.seconds)
        return self.count * cut.cost, self.count * float(self.nbytes[list(cut.kept)].sum())


def _at(
    folded: Repeated, few: tuple[Program, Layout], more: tuple[Program, Layout], moment: int, budget_bytes: int
) -> float:
    """The bound in seconds at one moment, which stands between forward and backward."""
    program, layout = few
    further = folded.times - layout.count
    beyond = moment + (more[1].count - layout.count) * layout.forward[1]
    here, there = _Moment(program, moment), _Moment(more[0], beyond)
    occupied = here.occupied_bytes + further * (there.occupied_bytes - here.occupied_bytes)
    size = layout.count - 2 * _AROUND
    groups, rest = divmod(folded.times - 2 * _AROUND, size)
    begin, length = layout.forward[0] + _AROUND * layout.forward[1], layout.forward[1]
    group = range(begin, begin + size * length)
    others = [*range(begin), *range(group.stop, moment)]
    parts = [(group, groups), (group[: rest * length], 1), (others, 1)]
    networks = [(_network(here, own), count) for own, count in parts]
    nbytes = np.array([float(v.nbytes) for v in program.values])
    seconds = np.array([op.again_seconds for op in program.ops])
    return _best([_Group(n, count, nbytes, seconds) for n, count in networks], budget_bytes - occupied)


def _network(moment: _Moment, own: Sequence[int]) -> Network:
    """Keep or run again, for what these ops make; what others have made is there for nothing."""
    program = moment.program
    made = {v for i in own for v in program.ops[i].writes}
    return build(
        (i for i in own if not program.ops[i].once),
        moment.demanded,
        lambda v: v not in made or v in moment.forced,
        lambda v: True,
        lambda i: program.ops[i].writes,
        lambda i: program.ops[i].reads,
    )


def _best(groups: list[_Group], free_bytes: int) -> float:
    """The largest bound over all prices, which is concave in the price."""
    wanted = sum(g.count * float(g.nbytes[list(g.network.wanted)].sum()) for g in groups)
    seconds = sum(g.count * float(g.seconds[list(g.network.ops)].sum()) for g in groups)
    if free_bytes < 0 or not wanted:
        return 0.0
    best, low, high, price = 0.0, 0.0, 0.0, seconds / wanted
    for _ in range(_STEPS):
        costs = [group.cost(price) for group in groups]
        best = max(best, sum(cost for cost, _ in costs) - price * free_bytes)
        if sum(kept for _, kept in costs) > free_bytes:
            low = price
        else:
            high = price
        price = next_price(price, low, high)
        if low and high and high < low * 1.0001:
            break
    return best
