"""Plans with offload, carried out by the reference engine over links of every temper: the same bits, the same peak."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.engines.numpy.tier import AtOnce
from autoremat.planner.search.moving import gaps, moved, places
from autoremat.program import Offload, Program, Schedule, simulate, verify
from tests.engines.numpy.meter import Meter
from tests.engines.numpy.offloads import LINK, assert_same, plan_of, random_moves, results_of
from tests.engines.numpy.steps_of_programs import scaled
from tests.engines.numpy.tiers import AsTold, AtOnceAndSpoiled, AtRandom, Late, all_orders, spoil
from tests.fixed import examples
from tests.planner.chains import uniform_steps
from tests.planner.random_programs import steps


@pytest.mark.slow
@pytest.mark.guard
@examples(40, everyday=6)
@given(program=steps(), seed=st.integers(0, 10**6))
def test_random_offloads_give_the_same_over_every_link(program: Program, seed: int) -> None:
    program = replace(scaled(program), link=LINK)
    schedule = random_moves(program, random.Random(seed))
    assert verify(program, schedule) == ()
    plan, results = plan_of(program, schedule), results_of(program)
    for tier in (AtOnce(), AtOnceAndSpoiled(), AtRandom(seed)):
        assert_same(plan, results, tier)
    with Meter() as meter:
        assert_same(plan, results, Late(), meter.look)
        assert meter.peak_bytes == plan.peak_bytes


@examples(20)
@given(program=steps(), share=st.floats(0, 1))
def test_what_is_moved_comes_down_to_the_budget(program: Program, share: float) -> None:
    program = replace(scaled(program), link=LINK)
    plain = Schedule.plain(program)
    least = simulate(program, replace(plain, offloads=widest(program))).peak_bytes
    budget = least + int(share * (simulate(program).peak_bytes - least))
    schedule = moved(program, plain, budget)
    if schedule is None:  # memory may have to be given up where the value is still needed
        return
    assert verify(program, schedule, budget_bytes=budget) == ()
    assert_same(plan_of(program, schedule), results_of(program), Late())


def widest(program: Program) -> tuple[Offload, ...]:
    """Every value away as long as it may."""
    schedule = Schedule.plain(program)
    found = gaps(program, schedule, places(program, schedule))
    return tuple(Offload(g.value, g.begin - 1, g.begin - 1, g.end, g.end) for g in found)


@pytest.mark.parametrize("n", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_all_interleavings_of_a_few_offloads(n: int) -> None:
    """Every copy at every moment between its begin and the wait for it."""
    program = replace(scaled(uniform_steps(8)), link=LINK)
    schedule = interleaved(program, n)
    assert len(schedule.offloads) == n
    plan = plan_of(program, schedule)
    names = [v.id for v in program.values]
    copies = []
    for o in schedule.offloads:  # tick p stands right before run p; gone and here are waited for by then
        copies.append((("out", names[o.value]), range(o.send + 1, o.gone + 2)))
        copies.append((("in", names[o.value]), range(o.fetch, o.here + 1)))
    orders = all_orders(copies)
    assert len(orders) == 9**n
    results = results_of(program)
    for moments in orders:
        tier = AsTold(moments)
        assert_same(plan, results, tier, tier.tick)


def interleaved(program: Program, n: int) -> Schedule:
    """The largest few values moved, each with a wait that overlaps those of others."""
    plain = Schedule.plain(program)
    found: dict[int, Offload] = {}
    for g in sorted(gaps(program, plain, places(program, plain)), key=lambda g: (-(g.end - g.begin), g.value)):
        if g.value not in found and g.end - g.begin > 4 and len(found) < n:
            found[g.value] = Offload(g.value, g.begin - 1, g.begin + 1, g.end - 2, g.end)
    return replace(plain, offloads=tuple(sorted(found.values(), key=lambda o: o.send)))


def test_a_source_that_is_freed_too_early_is_found_by_a_late_link() -> None:
    """The links of these tests do find what the judge forbids: the copy out reads what has been overwritten."""
    program = replace(scaled(uniform_steps(8)), link=LINK)
    schedule = interleaved(program, 1)
    plan = plan_of(program, schedule)

    class Careless(Late):
        def sent(self, name: str) -> None:
            spoil(self.sources[name])  # the memory is used again before the copy has been made
            super().sent(name)

    assert_same(plan, results_of(program), Late())
    with pytest.raises(AssertionError):
        assert_same(plan, results_of(program), Careless())
