"""What moves over the link, by the clock: the sums are the simulator's."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.program import Link, Program, Schedule, simulate
from autoremat.show.traffic import traffic_of
from tests.fixed import examples
from tests.planner.random_offloads import with_random_offloads
from tests.planner.random_programs import steps
from tests.program.hand import away, chain


@examples(40)
@given(program=steps(), seed=st.integers(0, 10**6), turns=st.booleans())
def test_waits_bytes_and_copies_are_those_of_the_account(program: Program, seed: int, turns: bool) -> None:
    program = replace(program, link=Link(2.0, 5.0, 0.1, takes_turns=turns))
    schedule = with_random_offloads(program, Schedule.plain(program), random.Random(seed))
    traffic, timeline = traffic_of(program, schedule), simulate(program, schedule)
    assert sum(traffic.waits) == pytest.approx(timeline.waited_seconds)
    # At the moment of a move more may be there than while any run happens.
    assert max(traffic.tier_bytes, default=0) <= timeline.tier_bytes
    for way in ("out", "in"):
        copies = [c for c in traffic.copies if c.way == way]
        assert sum(program.values[c.value].nbytes for c in copies) == timeline.sent_bytes
        assert all(a.end_seconds <= b.begin_seconds for a, b in pairwise(copies))
    assert len(traffic.copies) == 2 * len(schedule.offloads)


def test_one_move_by_hand() -> None:
    """``a`` is sent at second 3, once ``f1`` has run; fetched at second 7, and waited for at once."""
    program, schedule = away()
    traffic = traffic_of(program, schedule)
    out, back = traffic.copies
    assert (out.value, out.way, out.begin_seconds, out.end_seconds) == (1, "out", 3.0, 4.5)
    assert (back.value, back.way, back.begin_seconds, back.end_seconds) == (1, "in", 7.0, 9.5)
    assert traffic.tier_bytes == (0, 0, 20, 20, 0)
    assert sum(traffic.waits) == simulate(program, schedule).waited_seconds
    assert traffic_of(chain(), Schedule.plain(chain())).copies == ()
