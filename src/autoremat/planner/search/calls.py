"""Programs whose ops run again call by call, as programs whose ops run again one by one: a reduction, and back.

A call of torch's Python API may run several ops, and runs again from its first one on, up to some op after which it can
hand out a value. ``fold`` turns every such call into *stages*, one op each. A stage ends where values that later ops
read become available. Its first run is its own ops; a rerun is the whole prefix of the call up to there, and
costs that much. What never leaves the call is scratch. Any planner can plan that; ``unfold`` turns the order of its
runs into one of the program's ops. Two stages of one call that run again one after the other are one prefix.

The bytes of the folded program are never below those of the program. ``CallAccountant`` knows the latter exactly.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise

from autoremat.planner.search.memo import per_program
from autoremat.program import END, Once, Op, Program, Schedule, Value


@dataclass(frozen=True)
class Stage:
    """The ops of a program that one op of its folded program stands for.

    Attributes:
        call_begin: the first op of the call; a rerun begins there.
        begin: the first op of the stage; the first run begins there.
        end: the last op of the stage.
    """

    call_begin: int
    begin: int
    end: int


@dataclass(frozen=True)
class Folded(Program):
    """A program whose calls are folded into stages. Values have the numbers that they have in the program.

    Attributes:
        stages: for every op of this program the ops that it stands for.
    """

    stages: tuple[Stage, ...] = field(default=(), kw_only=True)

    @cached_property
    def before(self) -> dict[int, int]:
        """For every stage but the first of its call the one before it."""
        pairs = pairwise(enumerate(self.stages))
        return {k: j for (j, a), (k, b) in pairs if a.call_begin == b.call_begin}

    def unfold(self, order: Sequence[int]) -> list[int]:
        """The order of the program's ops that an order of the folded program stands for. O(runs)."""
        found: list[int] = []
        seen: set[int] = set()
        for p, i in enumerate(order):
            stage, again = self.stages[i], i in seen
            seen.add(i)
            if not (again and self._is_absorbed(order, p, seen)):
                found += range(stage.call_begin if again else stage.begin, stage.end + 1)
        return found

    def _is_absorbed(self, order: Sequence[int], p: int, seen: set[int]) -> bool:
        """Whether the next run is of a later stage of the same call, again: its prefix makes all that this one does."""
        if p + 1 == len(order) or order[p + 1] not in seen or order[p + 1] <= order[p]:
            return False
        return self.stages[order[p + 1]].call_begin == self.stages[order[p]].call_begin


@per_program
def folded_of(program: Program) -> Folded:
    """The folded program, made at the first call and kept while the program lives."""
    return fold(program)


def planned_as(program: Program) -> Program:
    """The program that planners work on: folded where it has calls of several ops, else as it is."""
    return folded_of(program) if program.has_calls else program


def program_of(folded: Folded) -> Program | None:
    """The program that ``folded_of`` has folded, while it lives."""
    return next((ref() for ref, known in folded_of.kept.values() if known is folded), None)


def unfolded(program: Program, schedule: Schedule) -> Schedule:
    """The schedule of the program that a schedule of ``planned_as(program)`` stands for. O(runs + reads)."""
    if not program.has_calls:
        return schedule
    return Schedule.from_order(program, folded_of(program).unfold(schedule.order))


def until_in(program: Program, until: Sequence[int]) -> Sequence[int]:
    """The ops of the program that stand where the given ops of ``planned_as(program)`` end."""
    if not program.has_calls:
        return until
    stages = folded_of(program).stages
    return [stages[i].end if i >= 0 else i for i in until]


def fold(program: Program) -> Folded:
    """The program with every call as a sequence of stages. O(reads + what the stages read)."""
    calls = [list(ops) for _, ops in groupby(range(len(program.ops)), key=program.call_begin.__getitem__)]
    found = [part for call in calls for part in _Call(program, call).parts()]
    stage_of = [k for k, part in enumerate(found) for _ in range(part.stage.begin, part.stage.end + 1)]
    home = {v: k for k, part in enumerate(found) for v in part.op.writes}
    values = tuple(_folded_value(program, v, home, stage_of) for v in range(len(program.values)))
    return Folded(
        program.name,
        values,
        tuple(part.op for part in found),
        recorded=program.recorded,
        timing=program.timing,
        abilities=program.abilities,
        stages=tuple(part.stage for part in found),
    )


def _folded_value(program: Program, v: int, home: dict[int, int], stage_of: Sequence[int]) -> Value:
    """The value in the folded program: held as long as later stages of its call read it in the first run."""
    value, producer = program.values[v], program.producer[v]
    if producer >= 0 and v not in home:
        return replace(value, nbytes=0, held=None, available=None, passing=False)
    if producer < 0 or value.held == END:
        held = value.held if value.held is None or value.held == END else stage_of[value.held]
        return replace(value, held=held, available=None)
    begin = program.call_begin[producer]
    until = max([program.hold[v], *(i for i in program.readers[v] if program.call_begin[i] == begin)])
    needed = stage_of[until] if until >= 0 else -1
    kept = value.held is not None or needed > home[v]
    return replace(value, held=needed if kept and needed >= 0 else None, available=None)


@dataclass(frozen=True)
class _Part:
    """One op of the folded program, and what it stands for."""

    stage: Stage
    op: Op


class _Call:
    """The ops of one call, on their way to stages."""

    def __init__(self, program: Program, ops: Sequence[int]) -> None:
        self._program, self._ops = program, ops
        self._begin, self._last = ops[0], ops[-1]
        self._made = [v for i in ops for v in program.ops[i].writes]
        self._last_use = {
            v: max([program.producer[v], program.hold[v], *(i for i in program.readers[v] if i <= self._last)])
            for v in self._made
        }

    def parts(self) -> list[_Part]:
        """The stages of the call; an op that stands alone is one stage, as it is."""
        if len(self._ops) == 1:
            op = replace(self._program.ops[self._begin], call=-1)
            return [_Part(Stage(self._begin, self._begin, self._begin), op)]
        ends = self._ends
        number = {end: k for k, end in enumerate(ends)}
        writes: list[list[int]] = [[] for _ in ends]
        for v, end in self._appears.items():
            writes[number[end]].append(v)
        begins = [self._begin, *(end + 1 for end in ends[:-1])]
        return [self._part(begin, end, tuple(w)) for begin, end, w in zip(begins, ends, writes, strict=True)]

    # -- what leaves the call ------------------------------------------------------------------------------------------

    def _is_read_outside(self, v: int) -> bool:
        readers = self._program.readers[v]
        return bool(readers) and readers[-1] > self._last

    def _leaves(self, v: int) -> bool:
        """Whether the value is in memory after the first run of the call."""
        return self._is_read_outside(v) or self._program.hold[v] > self._last

    @cached_property
    def _appears(self) -> dict[int, int]:
        """For every value that a stage writes the last op of that stage."""
        program, found = self._program, dict[int, int]()
        for v in self._made:
            if self._leaves(v) or v in self._overwriting:
                ready = program.available[v] if self._is_read_outside(v) else program.producer[v]
                found[v] = self._ends[bisect_left(self._ends, ready)]
        return found

    @cached_property
    def _ends(self) -> list[int]:
        """The last ops of the stages. After an op that overwrites what comes from outside, only the end of the call."""
        ends = {self._program.available[v] for v in self._made if self._is_read_outside(v)}
        made, ops = set(self._made), self._program.ops
        first = next((i for i in self._ops if any(old not in made for _, old in ops[i].in_place)), self._last)
        return [*sorted(end for end in ends if end < first), self._last]

    @cached_property
    def _overwriting(self) -> dict[int, int]:
        """The last versions of what came from outside and was overwritten in place, each with what it was."""
        made, origin = set(self._made), dict[int, int]()
        for i in self._ops:
            for new, old in self._program.ops[i].in_place:
                if old in origin or old not in made:
                    origin[new] = origin.pop(old, old)
        return origin

    # -- one stage -----------------------------------------------------------------------------------------------------

    def _part(self, begin: int, end: int, writes: tuple[int, ...]) -> _Part:
        """The stage from ``begin`` to ``end``, with the costs of its first run and of a rerun."""
        ops, count = self._program.ops, end - self._begin + 1
        op = Op(
            ops[end].name,
            tuple(v for v, i in self._reads.items() if i <= end),
            writes,
            sum(ops[i].seconds for i in range(begin, end + 1)),
            self._scratch(begin, end, writes),
            ops[end].phase,
            self._reasons[count - 1],
            tuple((new, old) for new, old in self._overwriting.items() if new in writes),
            ops[end].module,
            ops[end].source,
            rerun_seconds=self._again_seconds[count - 1],
            rerun_scratch_bytes=self._scratch_again(end, writes),
        )
        return _Part(Stage(self._begin, begin, end), op)

    @cached_property
    def _reads(self) -> dict[int, int]:
        """What comes from outside, each with the op that reads it first."""
        made, found = set(self._made), dict[int, int]()
        for i in self._ops:
            for v in self._program.ops[i].reads:
                if v not in made:
                    found.setdefault(v, i)
        return found

    @cached_property
    def _reasons(self) -> list[Once | None]:
        """For every prefix, by its last op, why it must not run again; None where it may."""
        return list(accumulate((self._program.ops[i].once for i in self._ops), lambda a, b: a or b))

    @cached_property
    def _again_seconds(self) -> list[float]:
        """For every prefix what a rerun of it takes."""
        return list(accumulate(self._program.ops[i].again_seconds for i in self._ops))

    def _scratch(self, begin: int, end: int, writes: tuple[int, ...]) -> int:
        """Temporary bytes of the first run: all that the stage does not write, nor an earlier one has written."""
        need = max(self._first_need[i - self._begin] for i in range(begin, end + 1))
        return max(0, need - self._bytes(writes))

    def _scratch_again(self, end: int, writes: tuple[int, ...]) -> int:
        """Temporary bytes of a rerun: all that the prefix makes and the stage does not write, which stays."""
        need, nbytes = self._most_again[end - self._begin], self._program.values
        begin = min((self._last_use[v] for v in writes), default=end) + 1
        for i in range(begin, end + 1):
            staying = sum(nbytes[v].nbytes for v in writes if self._program.producer[v] <= self._last_use[v] < i)
            need = max(need, self._again_need[i - self._begin] + staying)
        return max(0, need - self._bytes(writes))

    def _bytes(self, values: Iterable[int]) -> int:
        return sum(self._program.values[v].nbytes for v in values)

    @cached_property
    def _first_need(self) -> list[int]:
        """For every op the bytes of its first run that the call makes; what a stage writes counts up to its end."""
        life = {v: self._appears.get(v, last) for v, last in self._last_use.items()}
        return self._needs(life, [self._program.ops[i].scratch_bytes for i in self._ops])

    @cached_property
    def _again_need(self) -> list[int]:
        """The same of a rerun of which nothing stays."""
        return self._needs(self._last_use, [self._program.ops[i].again_scratch_bytes for i in self._ops])

    @cached_property
    def _most_again(self) -> list[int]:
        """For every prefix the most of them."""
        return list(accumulate(self._again_need, max))

    def _needs(self, life: Mapping[int, int], scratch: Sequence[int]) -> list[int]:
        """For every op the bytes of what the call has made and is still there, and scratch. O(ops + values)."""
        values, producer = self._program.values, self._program.producer
        steps = [0] * (len(self._ops) + 1)
        for v, last in life.items():
            steps[producer[v] - self._begin] += values[v].nbytes
            steps[min(last, self._last) + 1 - self._begin] -= values[v].nbytes
        found = []
        for i, live, own in zip(self._ops, accumulate(steps), scratch, strict=False):
            taken = ((new, old) for new, old in self._program.ops[i].in_place if life.get(old, -1) == i)
            found.append(live + own - sum(min(values[new].nbytes, values[old].nbytes) for new, old in taken))
        return found
