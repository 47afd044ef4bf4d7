"""Places a schedule's values as a caching allocator would.

That gives addresses, and what the allocator has to reserve.

A budget is about bytes that are allocated. An allocator rounds them up, keeps what is freed for later, and cannot join
what lies apart: what it *reserves* of the device is more. The rules here are those of torch's allocator for CUDA
(``c10/cuda/CUDACachingAllocator.cpp``, its defaults): 512 bytes at least, small requests from segments of 2 MiB, others
from 20 MiB, the largest from one of their own; the smallest free block that fits, split where enough remains;
neighbours that are free are joined; no segment goes back to the device.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Final

from autoremat.program.model import Op, Program
from autoremat.program.plan import Plan
from autoremat.program.schedule import Fetch, Gone, Schedule

UNIT_BYTES: Final = 512
"""All blocks have a multiple of these."""

SMALL_BYTES: Final = 1 << 20
"""Requests up to it come from segments of their own kind, and a block above it is split only where more remains."""

SMALL_SEGMENT_BYTES: Final = 2 << 20
LARGE_SEGMENT_BYTES: Final = 20 << 20
OWN_SEGMENT_BYTES: Final = 10 << 20
"""Requests from here on have a segment of their own, in multiples of ``SMALL_SEGMENT_BYTES``."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where something lies, and when.

    Attributes:
        value: index of the value; -1: scratch.
        segment: number of the segment, in the order in which they were reserved.
        offset_bytes: within it.
        nbytes: rounded up.
        begin: the run at which it comes; -1: it is there before.
        end: the run after which, or in which, it goes; the number of runs: it stays.
    """

    value: int
    segment: int
    offset_bytes: int
    nbytes: int
    begin: int
    end: int


@dataclass(frozen=True)
class Addresses:
    """What a caching allocator makes of a schedule.

    Attributes:
        reserved_bytes: of all segments together.
        allocated_bytes: the most bytes of blocks in use at a time, each rounded up; at least the peak of the schedule.
        placements: of everything that has bytes, in the order in which it goes.
        segments: bytes of every segment.
    """

    reserved_bytes: int
    allocated_bytes: int
    placements: tuple[Placement, ...]
    segments: tuple[int, ...]


@dataclass(slots=True)
class Block:
    """A part of a segment; ``before`` and ``after`` are its neighbours there."""

    segment: int
    offset_bytes: int
    nbytes: int
    is_small: bool
    is_free: bool = False
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)

    @property
    def rank(self) -> tuple[int, int, int]:
        """By which free blocks are ordered: the smallest first, then by address."""
        return self.nbytes, self.segment, self.offset_bytes


class Heap:
    """A caching allocator without a limit.

    Attributes:
        segments: bytes of every segment reserved so far.
        allocated_bytes: of the blocks in use.
        most_bytes: the most of them at a time.
    """

    def __init__(self) -> None:
        self.segments: list[int] = []
        self.allocated_bytes = self.most_bytes = 0
        self._free: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
        self._blocks: dict[tuple[int, int], Block] = {}
        """The free blocks by segment and offset."""

    def take(self, nbytes: int) -> Block:
        """Find a block for so many bytes, at least one.

        Reserves a segment where none fits. O(free blocks).
        """
        size = max(1, -(-nbytes // UNIT_BYTES)) * UNIT_BYTES
        is_small = size <= SMALL_BYTES
        free = self._free[is_small]
        k = bisect_left(free, (size, -1, -1))
        block = self._blocks[free[k][1:]] if k < len(free) else self._reserved(size, is_small)
        if block.is_free:
            self._no_longer_free(block)
        rest = block.nbytes - size
        if rest >= UNIT_BYTES if is_small else rest > SMALL_BYTES:
            self._split(block, size)
        self.allocated_bytes += block.nbytes
        self.most_bytes = max(self.most_bytes, self.allocated_bytes)
        return block

    def give(self, block: Block) -> None:
        """Take a block back, and join it with free neighbours.

        O(free blocks).
        """
        self.allocated_bytes -= block.nbytes
        before, after = block.before, block.after
        if after is not None and after.is_free:
            self._no_longer_free(after)
            self._join(block, after)
        if before is not None and before.is_free:
            self._no_longer_free(before)
            self._join(before, block)
            block = before
        self._set_free(block)

    def _reserved(self, size: int, is_small: bool) -> Block:
        nbytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        if size >= OWN_SEGMENT_BYTES:
            nbytes = -(-size // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        self.segments.append(nbytes)
        return Block(len(self.segments) - 1, 0, nbytes, is_small)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.segment, block.offset_bytes + size, block.nbytes - size, block.is_small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.nbytes = rest, size
        self._set_free(rest)

    def _join(self, block: Block, after: Block) -> None:
        block.nbytes, block.after = block.nbytes + after.nbytes, after.after
        if after.after is not None:
            after.after.before = block

    def _set_free(self, block: Block) -> None:
        block.is_free = True
        insort(self._free[block.is_small], block.rank)
        self._blocks[block.rank[1:]] = block

    def _no_longer_free(self, block: Block) -> None:
        block.is_free = False
        free = self._free[block.is_small]
        del free[bisect_left(free, block.rank)]
        del self._blocks[block.rank[1:]]


def place(program: Program, plan: Plan | Schedule | None = None) -> Addresses:
    """Say where a caching allocator would put everything, run by run.

    Scratch is there for its run alone. An in-place op whose input leaves with it writes where that was, unless it makes
    something of another size. A value that is made while it is still there takes a second block for that run. What the
    allocator does where the device is full (it gives back what is free, and asks again) is left out: nothing here is
    ever full. O(runs * log runs), more where many blocks are free.

    Args:
        program: the step.
        plan: or a schedule; the plain program unless given.

    Example:
        >>> from autoremat.program import Op, Program, Value
        >>> values = Value("x", 4, fixed=True), Value("a", 600), Value("y", 4)
        >>> found = place(Program("tiny", values, (Op("f", (0,), (1,)), Op("g", (1,), (2,)))))
        >>> found.allocated_bytes, found.reserved_bytes
        (2048, 2097152)
    """
    schedule = plan.schedule if isinstance(plan, Plan) else plan or Schedule.plain(program)
    walk = _Walk(program)
    seen: set[int] = set()
    for p, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        for event in (*schedule.moves[p][0], *schedule.moves[p][1]):
            if isinstance(event, Gone):
                walk.go(event.value, p)
            elif isinstance(event, Fetch):
                walk.come(event.value, p)
        walk.run(p, program.ops[i], frees, is_again=i in seen)
        seen.add(i)
    for v in list(walk.there):
        walk.go(v, len(schedule.order))
    heap = walk.heap
    return Addresses(sum(heap.segments), heap.most_bytes, tuple(walk.placements), tuple(heap.segments))


class _Walk:
    """A schedule on a heap, run by run."""

    def __init__(self, program: Program) -> None:
        self.heap, self.placements, self._program = Heap(), list[Placement](), program
        self.there: dict[int, tuple[Block, int]] = {}
        """The blocks of the values in memory, and since which run they have been there."""
        for v, value in enumerate(program.values):
            if value.fixed:
                self.come(v, -1)

    def come(self, value: int, p: int) -> None:
        """Take memory for a value."""
        if nbytes := self._program.values[value].nbytes:
            self.there[value] = self.heap.take(nbytes), p

    def go(self, value: int, p: int) -> None:
        """Let a value leave."""
        if value in self.there:
            block, begin = self.there.pop(value)
            self._leave(value, block, begin, p)

    def run(self, p: int, op: Op, frees: tuple[int, ...], *, is_again: bool) -> None:
        """Run an op.

        Takes what it writes and its scratch; then what is over leaves.
        """
        double = [(v, *self.there.pop(v)) for v in op.writes if v in self.there]
        for v in self._made(op, frees, p):
            self.come(v, p)
        if scratch := op.again_scratch_bytes if is_again else op.scratch_bytes:
            self._leave(-1, self.heap.take(scratch), p, p)
        for v, block, begin in double:
            self._leave(v, block, begin, p)
        for v in frees:
            self.go(v, p)

    def _made(self, op: Op, frees: tuple[int, ...], p: int) -> list[int]:
        """List what an op writes to memory of its own.

        The rest gets the blocks that it takes over.
        """
        sizes, taken = self._program.values, set[int]()
        for new, old in op.in_place:
            if old in frees and old in self.there and sizes[new].nbytes == sizes[old].nbytes:
                block, begin = self.there.pop(old)
                self.placements.append(_placement(old, block, begin, p - 1))
                self.there[new] = block, p
                taken.add(new)
        return [v for v in op.writes if v not in taken]

    def _leave(self, value: int, block: Block, begin: int, p: int) -> None:
        self.placements.append(_placement(value, block, begin, p))
        self.heap.give(block)


def _placement(value: int, block: Block, begin: int, end: int) -> Placement:
    return Placement(value, block.segment, block.offset_bytes, block.nbytes, begin, end)
