"""``fold`` and ``unfold``: equal layers as a few and a count.

Steps of time are folded like layers.

A step repeats itself where its forward runs the same ops over and over on values of the same sizes, and its backward
does so in the opposite order: the blocks of a transformer, the steps of an unrolled loop. ``fold`` finds that, and
keeps ``KEPT`` repetitions, which are a program as well; ``unfold`` writes any number of them out. What stands before,
between and after them stays as it is. One ``Op`` with a body would not do: the first and the last repetition are unlike
the others (they read what others made), plans treat repetitions differently, and all that plans, judges, draws or runs
a program would have to know a second kind of op. A few repetitions are a program, and what is known of them holds for
many: bytes and seconds grow by the same amounts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from autoremat.program.errors import InvalidProgram
from autoremat.program.model import END, Op, Program, Value

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Keys = npt.NDArray[np.int64]
    Bools = npt.NDArray[np.bool_]

KEPT: Final = 6
"""Repetitions of a folded program: the first two and the last two are unlike those in the middle."""

_NEAR: Final = 2
"""A repetition reads what others no further away have made; what is further away stands outside all of them."""

_PERIODS: Final = 24
"""How many lengths of a repetition are tried."""

_NUMBER: Final = re.compile(r"\d+")

Place = tuple[int, int]
"""Repetition, and index of an op or a value in the folded program; repetition -1: outside all of them."""


@dataclass(frozen=True)
class Layout:
    """Where the repetitions of a program stand.

    Attributes:
        count: how many there are.
        forward: the first op of the first one's forward, and how many ops the forward of each has.
        backward: the first op of the last one's backward, which is the first to run, and the number of ops of each;
            ``(0, 0)`` where nothing repeats there.
    """

    count: int
    forward: tuple[int, int]
    backward: tuple[int, int] = (0, 0)

    @property
    def middle(self) -> int:
        """The last repetition of the first half."""
        return (self.count + 1) // 2 - 1

    def repetition_of(self, op: int) -> int:
        """Find the repetition that an op belongs to; -1 for none."""
        begin, size = self.forward
        if begin <= op < begin + size * self.count:
            return (op - begin) // size
        begin, size = self.backward
        if begin <= op < begin + size * self.count:
            return self.count - 1 - (op - begin) // size
        return -1

    def grouped(self, size: int) -> Layout:
        """Join so many repetitions into one.

        The program is the same; those at the front that are too many stand outside.

        Example:
            >>> Layout(7, (3, 10), (100, 20)).grouped(2)
            Layout(count=3, forward=(13, 20), backward=(100, 40))
        """
        count, rest = divmod(self.count, size)
        (begin, length), (later, backward) = self.forward, self.backward
        return Layout(count, (begin + rest * length, size * length), (later, size * backward))


@dataclass(frozen=True)
class Repeated:
    """A program whose repetitions are written out a few times.

    Attributes:
        program: with ``layout.count`` repetitions.
        layout: where they stand.
        times: how many repetitions are meant.

    Raises:
        InvalidProgram: the repetitions are not among the ops, or fewer than two.
    """

    program: Program
    layout: Layout
    times: int

    def __post_init__(self) -> None:
        (begin, size), (later, length), count = self.layout.forward, self.layout.backward, self.layout.count
        end, last = begin + size * count, later + length * count
        inside = begin >= 0 and size > 0 and end <= (later if length else end) and length >= 0
        if not inside or max(end, last) > len(self.program.ops) or min(count, self.times) < 2:
            raise InvalidProgram(
                f"repeats: {count} repetitions with forward {self.layout.forward} and backward {self.layout.backward}, "
                f"{self.times} times, do not stand in a program with {len(self.program.ops)} ops"
            )

    @cached_property
    def ops(self) -> int:
        """How many ops all of it has."""
        each = self.layout.forward[1] + self.layout.backward[1]
        return len(self.program.ops) + each * (self.times - self.layout.count)

    def to_json(self, path: str | Path | None = None) -> str:
        """Write the few repetitions as JSON, also to ``path`` if given.

        It is a program file with a field ``repeats``.
        """
        from autoremat.program.json_format import repeated_to_data, write_json

        return write_json(repeated_to_data(self), path)

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> Repeated:
        """Read a folded program from a file of ``to_json``.

        It stays folded; ``Program.from_json`` writes it out.

        Raises:
            InvalidProgram: as ``Program.from_json``, or nothing is folded there.
        """
        from autoremat.program.json_format import read_json, repeated_from_data

        return repeated_from_data(read_json(source))


def fold(program: Program) -> Repeated | None:
    """Fold the repetitions of a program.

    None where there are fewer than twice ``KEPT``. O(reads).

    ``unfold`` gives the same program again, up to the numbers and names of values; that is checked here.

    Example:
        >>> values = tuple(Value(f"v{k}", 8, fixed=k == 0) for k in range(41))
        >>> chain = Program("chain", values, tuple(Op("layer", (k,), (k + 1,), 1.0) for k in range(40)))
        >>> folded = fold(chain)
        >>> folded.times, len(folded.program.ops), len(unfold(folded).ops)
        (40, 6, 40)
    """
    for layout in _layouts(program):
        if layout.count >= 2 * KEPT:
            few, there = with_times(program, layout, KEPT)
            folded = Repeated(few, there, layout.count)
            if is_same(unfold(folded), program):
                return folded
    return None


def unfold(folded: Repeated, times: int | None = None) -> Program:
    """Write out a program with all of its repetitions.

    Or with another number of them. O(reads of the result).
    """
    return with_times(folded.program, folded.layout, folded.times if times is None else times)[0]


def with_times(program: Program, layout: Layout, times: int) -> tuple[Program, Layout]:
    """Write a program with another number of repetitions.

    The layout says where they stand then.

    Copies are of the last one of the first half; the first ones and the last ones stay as they are.

    Raises:
        InvalidProgram: fewer than two are asked for, or the repetitions are not alike.
    """
    if times < 2:
        raise InvalidProgram(f"a program with {times} repetitions is asked for; at least 2 are needed")
    if times == layout.count:
        return program, layout
    written = written_out(program, layout, times)
    return written.program, written.layout


@dataclass(frozen=True)
class Written:
    """A program with another number of repetitions.

    With it comes where everything in it comes from.

    Attributes:
        program: the new one.
        layout: where its repetitions stand.
        ops: for every op its repetition (-1: none) and the op of the old program that it is a copy of.
        values: the same for every value.
    """

    program: Program
    layout: Layout
    ops: tuple[Place, ...]
    values: tuple[Place, ...]


def written_out(program: Program, layout: Layout, times: int) -> Written:
    """Write a program with another number of repetitions.

    ``with_times`` says more.
    """
    return _Writer(program, layout, times).result()


def is_same(a: Program, b: Program) -> bool:
    """Tell whether two programs are the same but for names.

    That is, but for the order and the ids of their values, and the numbers of calls.
    """
    if len(a.ops) != len(b.ops) or len(a.values) != len(b.values):
        return False
    return all(x == y for x, y in zip(_canonical(a), _canonical(b), strict=True))


def _canonical(program: Program) -> Iterator[object]:
    """Describe a program op by op, in numbers of its own.

    Values and calls are numbered as they are met.
    """
    numbers: dict[int, int] = {}
    calls: dict[int, int] = {-1: -1}

    def met(values: Sequence[int]) -> list[tuple[int, object]]:
        new = [v for v in values if v not in numbers]
        for v in new:
            numbers[v] = len(numbers)
        return [(numbers[v], _value_of(program, v) if v in new else None) for v in values]

    for op in program.ops:
        pairs = [(met([a])[0][0], met([b])[0][0]) for a, b in op.in_place]
        call = calls.setdefault(op.call, len(calls))
        yield met(op.reads), met(op.writes), replace(op, reads=(), writes=(), in_place=(), call=-1), pairs, call
    yield Counter(_value_of(program, v) for v in range(len(program.values)) if v not in numbers)


def _value_of(program: Program, v: int) -> object:
    return replace(program.values[v], id="", label="", held=program.hold[v])


# --- Finding repetitions ----------------------------------------------------------------------------------------------


def _layouts(program: Program) -> Iterator[Layout]:
    """Yield layouts of repetitions, those that cover most ops first.

    They say where repetitions may stand.
    """
    import numpy as np

    keys = _keys(program)
    is_backward = np.array([op.phase == "backward" for op in program.ops], dtype=bool)
    split = int(np.argmax(is_backward)) if is_backward.any() else len(keys)
    forward, backward = keys[:split], keys[split:]
    found: list[Layout] = []
    for begin, size, count in _stretches(forward):
        if not len(backward):
            found += _trimmed(Layout(count, (begin, size)))
        for later, length, n in _stretches(backward) if len(backward) else ():
            found += _trimmed(_matched(program, (begin, size, count), (split + later, length, n)))
    yield from sorted(found, key=lambda layout: -layout.count * (layout.forward[1] + layout.backward[1]))


def _matched(program: Program, forward: tuple[int, int, int], backward: tuple[int, int, int]) -> Layout:
    """Match the repetitions of both stretches.

    Those belong together of which the backward's reads what the forward's made.
    """
    (begin, size, count), (later, length, n) = forward, backward
    sums = Counter[int]()
    for j in range(n):
        for i in range(later + j * length, later + (j + 1) * length):
            made = [program.producer[v] - begin for v in program.ops[i].reads]
            sums.update(j + at // size for at in made if 0 <= at < size * count)
    last = max(sums, key=lambda s: (sums[s], s), default=n - 1)
    low, high = max(0, last - n + 1), min(count - 1, last)
    return Layout(max(0, high - low + 1), (begin + low * size, size), (later + (last - high) * length, length))


def _trimmed(layout: Layout) -> Iterator[Layout]:
    """Yield the layout, and those with fewer repetitions.

    One or two are left out at either end: those may be unlike the others.
    """
    (begin, size), (later, length) = layout.forward, layout.backward
    for front in range(_NEAR + 1):
        for back in range(_NEAR + 1):
            count = layout.count - front - back
            if count >= 2 * KEPT:
                yield Layout(count, (begin + front * size, size), (later + back * length, length))


def _keys(program: Program) -> Keys:
    """Give every op a number.

    Ops that may be repetitions of each other have the same.
    """
    import numpy as np

    numbers: dict[object, int] = {}
    values = program.values
    found = [
        numbers.setdefault(
            (
                op.name, op.seconds, op.scratch_bytes, op.phase, op.once, op.kind, op.rerun_seconds,
                tuple(values[v].nbytes for v in op.reads[:8]), tuple(values[v].nbytes for v in op.writes),
            ),
            len(numbers),
        )
        for op in program.ops
    ]  # fmt: skip
    return np.array(found, dtype=np.int64)


def _stretches(keys: Keys) -> list[tuple[int, int, int]]:
    """Find begin, length and count of what repeats itself.

    For each length the longest stretch, most ops first.
    """
    distances = Counter[int]()
    last: dict[int, int] = {}
    for i, key in enumerate(keys.tolist()):
        if key in last:
            distances[i - last[key]] += 1
        last[key] = i
    likely = {length for length, _ in distances.most_common(_PERIODS)}
    most = max(distances.values(), default=0)
    found = list[tuple[int, int, int]]()
    for length in sorted(likely | {d for d, n in distances.items() if 4 * n >= most}):
        begin, covered = _longest(keys[length:] == keys[:-length])
        if covered:
            found.append((begin, length, (covered + length) // length))
    return sorted(found, key=lambda s: -s[1] * s[2])[:_PERIODS]


def _longest(same: Bools) -> tuple[int, int]:
    """Find where the longest run of True begins, and its length."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate([[0], same.astype(np.int8), [0]])))
    if not len(edges):
        return 0, 0
    lengths = edges[1::2] - edges[::2]
    k = int(lengths.argmax())
    return int(edges[2 * k]), int(lengths[k])


# --- Writing repetitions out ------------------------------------------------------------------------------------------


class _Writer:
    """One program with another number of repetitions, on the way."""

    def __init__(self, program: Program, layout: Layout, times: int) -> None:
        self.program, self.layout, self.times = program, layout, times
        self.head = min((layout.count + 1) // 2, (times + 1) // 2)
        """So many of the first ones stay, and of the last ones as many as are left of the smaller number."""
        self.tail = min(layout.count, times) - self.head
        self.home = _homes(program, layout)
        self.slots = _slots(program, layout, self.home)
        self.origin = [k if k < self.head else max(self.head - 1, k - times + layout.count) for k in range(times)]
        """For every repetition the one it is written down from."""
        self.new: dict[Place, int] = {}
        """Numbers of the new values, by repetition and value of the old program."""
        self.sources: list[Place] = []

    def result(self) -> Written:
        """Build the new program."""
        places = list(self._places())
        calls = _Calls()
        ops = [self._op(*place, calls) for place in places]
        at = {place: i for i, place in enumerate(places)}
        for v in range(len(self.program.values)):  # nobody reads or writes them, but they are there
            for k in range(self.times) if self.home[v] >= 0 else ():
                if self.origin[k] == self.home[v]:
                    self._number(k, v)
            if self.home[v] < 0:
                self._number(-1, v)
        values = [self._value(n, *place, at) for n, place in enumerate(self.sources)]
        (begin, size), (later, length) = self.layout.forward, self.layout.backward
        moved = later + size * (self.times - self.layout.count) if length else 0
        layout = Layout(self.times, (begin, size), (moved, length))
        program = replace(self.program, values=tuple(values), ops=tuple(ops))
        return Written(program, layout, tuple(places), tuple(self.sources))

    def _places(self) -> Iterator[Place]:
        """List the new ops: repetition, and op of the old program."""
        (begin, size), (later, length) = self.layout.forward, self.layout.backward
        count, n = self.layout.count, len(self.program.ops)
        yield from ((-1, i) for i in range(begin))
        for k in range(self.times):
            yield from ((k, begin + self.origin[k] * size + j) for j in range(size))
        yield from ((-1, i) for i in range(begin + count * size, later if length else n))
        for k in reversed(range(self.times)) if length else ():
            yield from ((k, later + (count - 1 - self.origin[k]) * length + j) for j in range(length))
        yield from ((-1, i) for i in range(later + count * length, n) if length)

    def _op(self, k: int, i: int, calls: _Calls) -> Op:
        """Copy an op as repetition ``k`` runs it."""
        old = self.program.ops[i]
        reads = [n for v in old.reads for n in self._copies(k, v)]
        writes = [n for v in old.writes for n in self._copies(k, v)]
        pairs = [
            (new, taken)
            for a, b in old.in_place
            for new, taken in zip(self._copies(k, a), self._copies(k, b), strict=True)
        ]
        module = self._text(old.module, k, lambda: self._module_beside(i))
        call = calls.number(old.call, k if old.call >= 0 else -1)
        return replace(old, reads=tuple(reads), writes=tuple(writes), in_place=tuple(pairs), call=call, module=module)

    def _copies(self, k: int, v: int) -> list[int]:
        """Find the new values that stand for ``v``.

        An op of repetition ``k`` reads or writes them.
        """
        home = self.home[v]
        if home < 0:
            return [self._number(-1, v)]
        if k >= 0 and abs(home - self.origin[k]) <= _NEAR:
            there = k + home - self.origin[k]
            return [self._number(there, self._like(there, home, v))]
        # From outside, or from far away: the repetition itself, and its copies.
        return [self._number(j, v) for j in range(self.times) if self.origin[j] == home]

    def _like(self, there: int, home: int, v: int) -> int:
        """Find the old program's value in the place of ``v``.

        It is the value that a repetition has where ``home`` has ``v``.
        """
        if not 0 <= there < self.times:
            raise InvalidProgram("the repetitions are not alike")
        origin = self.origin[there]
        return v if origin == home else self._counterpart(v, home, origin)

    def _counterpart(self, v: int, home: int, origin: int) -> int:
        """Find the value that ``origin`` has where ``home`` has ``v``.

        It is made, or read, by the same op of that repetition.
        """
        where = self.slots[home].get(v)
        found = None if where is None else self._values_at[origin].get(where)
        if found is None:
            raise InvalidProgram("the repetitions are not alike")
        return found

    @cached_property
    def _values_at(self) -> list[dict[tuple[int, int, int], int]]:
        return [{where: v for v, where in slots.items()} for slots in self.slots]

    def _number(self, k: int, v: int) -> int:
        if (k, v) not in self.new:
            self.new[k, v] = len(self.sources)
            self.sources.append((k, v))
        return self.new[k, v]

    def _value(self, n: int, k: int, v: int, at: dict[Place, int]) -> Value:
        """Copy a value as repetition ``k`` has it."""
        old = self.program.values[v]
        held = None if old.held is None else END if old.held == END else self._op_at(k, old.held, at)
        available = old.available if old.available is None or old.available < 0 else self._op_at(k, old.available, at)
        module = self._text(old.module, k, lambda: self._value_module_beside(v))
        return replace(old, id=f"v{n}", held=held, available=available, label="", module=module)

    def _op_at(self, k: int, i: int, at: dict[Place, int]) -> int:
        """Find the new op for an old op, seen from repetition ``k``."""
        home = self.layout.repetition_of(i)
        if home < 0:
            return at[-1, i]
        if k >= 0 and abs(home - self.origin[k]) <= _NEAR:
            there = k + home - self.origin[k]
            if 0 <= there < self.times:
                size = self.layout.forward[1] if i < self._late else self.layout.backward[1]
                step = 1 if i < self._late else -1
                return at[there, i + step * size * (self.origin[there] - home)]
        return max(at[j, i] for j in range(self.times) if self.origin[j] == home)

    @property
    def _late(self) -> int:
        return self.layout.backward[0] if self.layout.backward[1] else len(self.program.ops)

    def _module_beside(self, i: int) -> str:
        """Find the module of the same op of the repetition before."""
        size = -self.layout.forward[1] if i < self._late else self.layout.backward[1]
        return self.program.ops[i + size].module if 0 <= i + size < len(self.program.ops) else ""

    def _value_module_beside(self, v: int) -> str:
        """Find the module of the same value of the repetition before."""
        home = self.home[v]
        where = self.slots[home].get(v) if home >= 0 else None
        beside = None if where is None or home == 0 else self._values_at[home - 1].get(where)
        return "" if beside is None else self.program.values[beside].module

    def _text(self, text: str, k: int, beside: Callable[[], str]) -> str:
        """Write a path of modules as repetition ``k`` has it.

        Numbers that grow with the repetition are of its own.
        """
        if k < 0 or not text or self.origin[k] == k:
            return text
        known = beside()
        numbers, before = _NUMBER.findall(text), _NUMBER.findall(known)
        if _NUMBER.sub("#", text) != _NUMBER.sub("#", known) or numbers == before:
            return text
        steps = iter([int(b) - int(a) for a, b in zip(before, numbers, strict=True)])
        return _NUMBER.sub(lambda m: str(int(m.group()) + next(steps) * (k - self.origin[k])), text)


class _Calls:
    """Numbers of calls in the order they are met."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], int] = {}

    def number(self, call: int, k: int) -> int:
        """Number a call of one repetition; -1 for no call."""
        return -1 if call < 0 else self._known.setdefault((call, k), len(self._known))


def counterparts(program: Program, layout: Layout) -> tuple[int, ...]:
    """Find every value's counterpart in a repetition in the middle.

    That is the value itself where there is none. O(reads).
    """
    home = _homes(program, layout)
    slots = _slots(program, layout, home)
    middle = {where: v for v, where in slots[layout.middle].items()}
    return tuple(v if k < 0 else middle.get(slots[k].get(v, (-1, -1, -1)), v) for v, k in enumerate(home))


def _slots(program: Program, layout: Layout, home: Sequence[int]) -> list[dict[int, tuple[int, int, int]]]:
    """Find where each value of a repetition is first met.

    It is the op within the repetition, and the position there.
    """
    found: list[dict[int, tuple[int, int, int]]] = [{} for _ in range(layout.count)]
    for is_late, (begin, size) in enumerate((layout.forward, layout.backward)):
        for i in range(begin, begin + size * layout.count):
            k, op = layout.repetition_of(i), program.ops[i]
            for position, v in enumerate((*op.writes, *op.reads)):
                if home[v] == k:
                    found[k].setdefault(v, (is_late, (i - begin) % size, position))
    return found


def _homes(program: Program, layout: Layout) -> list[int]:
    """Find the repetition that every value belongs to.

    It is the one which makes the value, or reads it first; -1 for none.
    """
    readers: list[list[int]] = [[] for _ in program.values]
    home = [-1] * len(program.values)
    for i, op in enumerate(program.ops):
        k = layout.repetition_of(i)
        for v in op.reads:
            readers[v].append(k)
        for v in op.writes:
            home[v] = k
    for v, of_reads in enumerate(readers):
        if program.producer[v] < 0 and of_reads and max(of_reads) - min(of_reads) <= _NEAR:
            home[v] = of_reads[0]
    return home
