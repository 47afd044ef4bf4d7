"""Addresses under a caching allocator: by hand, and that nothing ever overlaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import solve
from autoremat.program import Addresses, Link, Op, Program, Schedule, Value, place, simulate
from autoremat.program.addresses import Heap, Placement
from benchmarks.layered import layered_graph
from tests.fixed import examples
from tests.strategies import orders, programs

KIB, MIB = 1 << 10, 1 << 20


def spots(found: Addresses) -> dict[int, tuple[int, int, int]]:
    """Of every value segment, offset and bytes."""
    return {p.value: (p.segment, p.offset_bytes, p.nbytes) for p in found.placements}


def test_small_ones_share_a_segment_and_are_rounded_up() -> None:
    """x: 1 -> 512 bytes; a: 513 -> 1,024; b: 1 MiB is the last small one, and c, one more byte, is large."""
    values = (Value("x", 1, fixed=True), Value("a", 513), Value("b", MIB), Value("c", MIB + 1))
    ops = (Op("a", (0,), (1,)), Op("b", (1,), (2,)), Op("c", (2,), (3,)))
    found = place(Program("", values, ops))
    assert spots(found) == {0: (0, 0, 512), 1: (0, 512, 1024), 2: (0, 1536, MIB), 3: (1, 0, MIB + 512)}
    assert found.segments == (2 * MIB, 20 * MIB)
    assert found.reserved_bytes == 22 * MIB
    assert found.allocated_bytes == 512 + MIB + MIB + 512  # a has left ahead of c


def test_a_large_segment_is_split_where_more_than_a_mebibyte_remains_and_the_largest_have_their_own() -> None:
    heap = Heap()
    five, nine = heap.take(5 * MIB), heap.take(9 * MIB)
    assert (five.offset_bytes, nine.offset_bytes, heap.segments) == (0, 5 * MIB, [20 * MIB])
    whole = heap.take(5 * MIB + 512)  # of the 6 MiB that are left; less than 1 MiB would remain
    assert (whole.offset_bytes, whole.nbytes, heap.segments) == (14 * MIB, 6 * MIB, [20 * MIB])
    assert heap.allocated_bytes == 20 * MIB
    heap.take(10 * MIB + 1)
    assert heap.segments == [20 * MIB, 12 * MIB]
    heap.give(nine)
    again = heap.take(7 * MIB)  # 9 MiB are free: 2 remain
    assert (again.offset_bytes, again.nbytes) == (5 * MIB, 7 * MIB)


def test_the_smallest_that_fits_is_taken_and_neighbours_are_joined() -> None:
    heap = Heap()
    blocks = [heap.take(n * KIB) for n in (4, 1, 2, 1, 4)]
    for k in (0, 2):
        heap.give(blocks[k])
    assert heap.take(2 * KIB).offset_bytes == 5 * KIB
    assert heap.take(1 * KIB).offset_bytes == 0
    heap.give(blocks[1])  # joins the 3 KiB before it
    assert heap.take(4 * KIB).offset_bytes == 1 * KIB
    assert heap.segments == [2 * MIB]


def test_what_lies_apart_cannot_be_used_together() -> None:
    """Six values of 10 MiB in memory, two that are not neighbours leave, and the next has 20 MiB."""
    sizes = [10, 10, 10, 20]
    values = (*(Value(f"v{k}", n * MIB) for k, n in enumerate(sizes)), Value("y", 4))
    ops = (*(Op(f"f{k}", (), (k,)) for k in range(3)), Op("g", (), (3,)), Op("h", (1, 3), (4,)))
    schedule = Schedule((0, 1, 2, 3, 4), ((), (), (0, 2), (), (1, 3)))
    program = Program("", values, ops)
    found = place(program, schedule)
    assert simulate(program, schedule).peak_bytes == 30 * MIB + 4
    assert found.segments == (10 * MIB, 10 * MIB, 10 * MIB, 20 * MIB, 2 * MIB)
    assert found.allocated_bytes == 30 * MIB + 512


def test_an_op_in_place_stays_where_it_is_and_scratch_is_there_for_its_run_alone() -> None:
    values = (Value("a", 1024), Value("b", 1024), Value("c", 2048))
    ops = (Op("a", (), (0,)), Op("b", (0,), (1,), in_place=((1, 0),), scratch_bytes=512), Op("c", (1,), (2,)))
    found = place(Program("", values, ops))
    assert found.placements == (
        Placement(0, 0, 0, 1024, 0, 0),
        Placement(-1, 0, 1024, 512, 1, 1),
        Placement(1, 0, 0, 1024, 1, 2),
        Placement(2, 0, 1024, 2048, 2, 2),
    )
    assert found.allocated_bytes == 3072


def test_what_moves_to_the_tier_gives_its_memory_up() -> None:
    n = 8
    values = (*(Value(f"v{k}", 20 * MIB) for k in range(n)), Value("y", 4))
    ops = (*(Op(f"f{k}", (k - 1,) if k else (), (k,), 1.0) for k in range(n)), Op("y", tuple(range(n)[::5]), (n,), 1.0))
    link = Link(1e12, 1e12)
    plan = solve(Program("", values, ops), "50 MB", link=link, effort=0.02)
    found = place(plan.program, plan)
    assert plan.schedule.offloads
    assert found.reserved_bytes < place(Program("", values, ops)).reserved_bytes


def test_a_plan_of_a_large_graph_reserves_little_more_than_it_allocates() -> None:
    program = layered_graph(250, 1)
    found = place(program)
    assert simulate(program).peak_bytes <= found.allocated_bytes <= found.reserved_bytes < 1.5 * found.allocated_bytes


@examples(100)
@given(data=st.data(), program=programs())
def test_nothing_overlaps_and_the_sums_are_right(data: st.DataObject, program: Program) -> None:
    """Also where values are made twice, are overwritten in place, or are empty."""
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    found = place(program, schedule)
    assert found.reserved_bytes == sum(found.segments) >= found.allocated_bytes
    if not any(op.in_place for op in program.ops) and all(b == i for i, b in enumerate(program.call_begin)):
        assert found.allocated_bytes >= simulate(program, schedule).peak_bytes
    for k, one in enumerate(found.placements):
        assert 0 <= one.offset_bytes <= one.offset_bytes + one.nbytes <= found.segments[one.segment]
        assert one.nbytes >= (program.values[one.value].nbytes if one.value >= 0 else 1)
        for other in found.placements[:k]:
            at_once = one.begin <= other.end and other.begin <= one.end
            apart = one.offset_bytes + one.nbytes <= other.offset_bytes
            apart |= other.offset_bytes + other.nbytes <= one.offset_bytes
            assert not at_once or one.segment != other.segment or apart
