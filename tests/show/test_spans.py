"""Spans say at every run what ``residents_at`` says, value by value, and their bytes are ``simulate``'s."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from autoremat.program import Program, Schedule, simulate
from autoremat.show.residents import residents_at
from autoremat.show.spans import spans_of
from tests.fixed import examples
from tests.planner.random_offloads import with_random_offloads
from tests.planner.random_programs import steps
from tests.program.hand import LINK, chain_plan, in_place
from tests.show.placed import placed, schedules


@given(st.data())
def test_spans_are_the_residents_of_every_run(data: st.DataObject) -> None:
    program = data.draw(placed())
    check_against_residents(program, data.draw(schedules(program)))


def check_against_residents(program: Program, schedule: Schedule) -> None:
    spans = spans_of(program, schedule)
    assert list(spans) == sorted(spans, key=lambda s: s.begin)
    for run, nbytes in enumerate(simulate(program, schedule).resident_bytes):
        here = Counter((s.value, s.category, s.nbytes) for s in spans if s.begin <= run <= s.end)
        known = [r for r in residents_at(program, schedule, run) if r.category != "scratch"]
        assert here == Counter((r.value, r.category, r.nbytes) for r in known)
        scratch = program.ops[schedule.order[run]].scratch_bytes
        assert sum(n * nbytes for (_, _, nbytes), n in here.items()) + scratch == nbytes


@examples(20)
@given(program=steps(), seed=st.integers(0, 99))
def test_what_is_in_a_slower_tier_is_in_no_span(program: Program, seed: int) -> None:
    program = replace(program, link=LINK)
    schedule = with_random_offloads(program, Schedule.plain(program), random.Random(seed))
    check_against_residents(program, schedule)


def test_of_a_value_that_is_made_again_there_are_two_spans() -> None:
    plan = chain_plan()
    assert [s for s in spans_of(plan.program, plan.schedule) if s.value == 1] == [
        (1, 0, 1, "temporaries", 20),
        (1, 4, 5, "recomputed activations", 20),
    ]


def test_a_storage_that_is_taken_over_counts_once() -> None:
    program = in_place()
    spans = [s for s in spans_of(program, Schedule.plain(program)) if s.value in (1, 3)]
    assert [(s.value, s.begin, s.end) for s in spans] == [(1, 0, 1), (3, 2, 3)]


def test_an_empty_program_has_no_spans() -> None:
    program = Program("", (), ())
    assert spans_of(program, Schedule.plain(program)) == ()
