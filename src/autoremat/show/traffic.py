"""What a schedule moves over its link, copy by copy.

With the clock of the copies come the waits for them, and what is in the tier meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from autoremat.program import Fetch, Gone, Here, Program, Schedule, Send
from autoremat.program.link import Clocks


class Copy(NamedTuple):
    """Says when one value is on its way.

    The way is ``out``, to the tier, or ``in``, back from there.
    """

    value: int
    way: str
    begin_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Traffic:
    """Copies of a step, waits for them, and bytes in the tier.

    Attributes:
        copies: in the order in which they are asked for.
        waits: for every run, the seconds of waiting ahead of it.
        tier_bytes: for every run, the bytes in the tier while it runs; a value is there from ``send`` to ``here``.
    """

    copies: tuple[Copy, ...] = ()
    waits: tuple[float, ...] = ()
    tier_bytes: tuple[int, ...] = ()


NONE = Traffic()
"""Of a schedule that moves nothing."""


def traffic_of(program: Program, schedule: Schedule) -> Traffic:
    """Follow the clocks of ops and link through a schedule.

    Waits add up to ``simulate``'s, and the largest of ``tier_bytes`` is its, too. O(runs).
    """
    if program.link is None or not schedule.offloads:
        return NONE
    clocks, copies, seen = Clocks(program.link), list[Copy](), set[int]()
    waits, tier_bytes, there = list[float](), list[int](), 0
    for p, i in enumerate(schedule.order):
        waited = clocks.waited_seconds
        for event in (*schedule.moves[p][0], *schedule.moves[p][1]):
            v, nbytes = event.value, program.values[event.value].nbytes
            match event:
                case Send():
                    copies.append(Copy(v, "out", *clocks.begin("out", v, nbytes)))
                    there += nbytes
                case Gone():
                    clocks.wait("out", v)
                case Fetch():
                    copies.append(Copy(v, "in", *clocks.begin("in", v, nbytes)))
                case Here():
                    clocks.wait("in", v)
                    there -= nbytes
        waits.append(clocks.waited_seconds - waited)
        tier_bytes.append(there)
        clocks.run(program.ops[i].again_seconds if i in seen else program.ops[i].seconds)
        seen.add(i)
    return Traffic(tuple(copies), tuple(waits), tuple(tier_bytes))
