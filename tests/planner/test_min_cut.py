"""The minimum cut against all choices there are."""

from itertools import chain as together
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner.search.min_cut import Pricer
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import reruns
from autoremat.planner.solvers.segments import boundaries, crossing
from autoremat.program import Program
from tests.fixed import examples
from tests.planner.chains import gpt
from tests.planner.random_programs import recorded_steps


def cost(program: Program, keep: frozenset[int], price: float) -> float:
    """Seconds of what runs again, plus the price of what is kept, also of what only further runs need."""
    tables = tables_of(program)
    again = [i for _, i in reruns(tables, (frozenset(tables.droppable) - keep,))]
    forced = {v for i in again for v in tables.reads[i] if tables.kept[v] and not tables.starts[v]}
    return sum(program.ops[i].seconds for i in again) + price * sum(program.values[v].nbytes for v in keep | forced)


@examples(60)
@given(program=recorded_steps(3, 8), price=st.sampled_from((0.001, 0.02, 0.1, 0.5, 3.0)))
def test_no_other_choice_is_cheaper(program: Program, price: float):
    tables = tables_of(program)
    keep = Pricer(tables).keep(price) & frozenset(tables.droppable)
    some = tables.droppable[:9]
    others = together.from_iterable(combinations(some, k) for k in range(len(some) + 1))
    rest = keep - frozenset(some)
    best = min(cost(program, frozenset(other) | rest, price) for other in others)
    assert cost(program, keep, price) <= best * (1 + 1e-6) + 1e-6


def test_a_dearer_byte_keeps_less():
    program = gpt(3)
    pricer = Pricer(tables_of(program))
    kept = [sum(program.values[v].nbytes for v in pricer.keep(price)) for price in pricer.prices(8)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_with_segments_what_crosses_into_a_segment_that_runs_again_is_kept():
    tables = tables_of(gpt(6, vocabulary=256))
    cuts = boundaries(tables, 6)
    pricer = Pricer(tables)
    assert crossing(tables, cuts) <= pricer.keep(pricer.prices(6)[-1], cuts)
