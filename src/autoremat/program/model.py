"""``Value``, ``Op`` and ``Program``: one training step, in the order it ran."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

from autoremat.program.abilities import Abilities
from autoremat.program.errors import InvalidProgram
from autoremat.program.link import Link
from autoremat.program.once import Once

Kind = Literal["op", "ask", "step"]
"""What an op is in the step."""

END: Final = -1
"""``Value.held`` of a value that something outside our reach keeps to the end of the step."""

INSIDE: Final = -2
"""``Value.available`` of a value that never leaves its call: neither saved by autograd nor an output of the call."""


@dataclass(frozen=True, slots=True)
class Value:
    """One version of one storage.

    Attributes:
        id: unique name within the program.
        nbytes: bytes of the storage.
        fixed: resident during the whole step (parameter, buffer, input, optimizer state).
        held: index of the op until which (inclusive) the value cannot leave, because a Python variable, a module
            attribute or the autograd engine holds it; ``END`` for the whole step; ``None`` when nothing holds it.
        label: what a person calls it, such as ``blocks.3.mlp.0 float32[8, 64, 256]``.
        kind: ``parameter``, ``buffer``, ``input``, ``optimizer``, ``gradient``, ``activation``, ``temporary`` or "".
        dtype: of the tensor as which the value was made, such as ``float32``; "" where that is not known.
        shape: of the same tensor; None where that is not known.
        module: path of the module that owns the value (a parameter, a buffer, their gradients); where it is "", the
            value belongs to the module of the op that writes it.
        available: index of the op of the same call after which a rerun of the call can hand the value out: one
            before autograd saves it, or the last of the call for its outputs; ``INSIDE`` when that never happens,
            ``None`` as soon as the op that writes it has run.
        passing: whether its first copy does not stay from the forward into the backward: a user wants it recomputed.
    """

    id: str
    nbytes: int
    fixed: bool = False
    held: int | None = None
    label: str = ""
    kind: str = ""
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    module: str = ""
    available: int | None = None
    passing: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One executed operator. Values are given by their index in ``Program.values``.

    While the op runs, what it reads, what it writes and its scratch are all resident. An op writes a value only once
    in a program; a rerun of the op (in a schedule) writes the same values again.

    Attributes:
        name: operator name, such as ``aten.mm.default``.
        reads: values that must be resident while the op runs; a value given twice is kept once.
        writes: values that the op produces.
        seconds: duration.
        scratch_bytes: temporary bytes inside the kernel, beyond reads and writes.
        phase: ``forward`` or ``backward``.
        once: why the op must not run again; None when it may.
        note: what stands in the place of ``{}`` in that sentence, if there is one.
        kind: ``ask`` where the backward asks for a saved value (it writes nothing and takes no time), ``step`` for the
            account of the optimizer's step, ``op`` for everything else.
        in_place: pairs ``(written, read)``: the written value takes over the storage of the read one, which is gone
            after the first run; so no later op of the program may read it, and it is neither fixed nor held longer.
            Where the read value is needed after a rerun, that run works on a copy and both are resident.
        module: path of the module that ran the op.
        source: ``file:line`` of the user's code that ran the op; of an op of the backward, where the value that it
            asked for last was saved.
        call: number of the call that the op belongs to: one call of torch's Python API may run several ops, and runs
            again from its first one only, op by op up to where it is stopped. -1 when the op may run again by itself.
        rerun_seconds: duration of a rerun, where that is another than of the first.
        rerun_scratch_bytes: the same of the temporary bytes.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    seconds: float = 0.0
    scratch_bytes: int = 0
    phase: str = "forward"
    once: Once | None = None
    in_place: tuple[tuple[int, int], ...] = ()
    module: str = ""
    source: str = ""
    call: int = -1
    rerun_seconds: float | None = None
    rerun_scratch_bytes: int | None = None
    note: str = ""
    kind: Kind = "op"

    @property
    def why(self) -> str:
        """Say why the op must not run again; "" when it may."""
        return "" if self.once is None else self.once.sentence(self.note)

    @property
    def again_seconds(self) -> float:
        """Duration of a rerun."""
        return self.seconds if self.rerun_seconds is None else self.rerun_seconds

    @property
    def again_scratch_bytes(self) -> int:
        """Temporary bytes of a rerun."""
        return self.scratch_bytes if self.rerun_scratch_bytes is None else self.rerun_scratch_bytes

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", tuple(dict.fromkeys(self.reads)))
        object.__setattr__(self, "writes", tuple(self.writes))


_BY_ITS_OPS: Final = Abilities()


def abilities_of(ops: Iterable[Op]) -> Abilities:
    """Assume what the engine that recorded these ops can do."""
    return Abilities("at asks" if any(op.kind == "ask" for op in ops) else "anywhere")


@dataclass(frozen=True)
class Program:
    """The ops of one training step in order, forward and backward.

    Raises:
        InvalidProgram: an id used twice, an index out of range, a value written twice, read before it is written or
            after it was overwritten in place, a negative size or duration.

    Example:
        >>> from autoremat.program import Op, Program, Value
        >>> x, a, y = Value("x", 4, fixed=True), Value("a", 8), Value("y", 4)
        >>> program = Program("tiny", (x, a, y), (Op("f", (0,), (1,), 1.0), Op("g", (1,), (2,), 2.0)))
        >>> program.seconds
        3.0
    """

    name: str
    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    recorded: str = field(default="", kw_only=True)
    """On what the step was recorded: ``fake`` or ``real`` tensors; "" if it was not recorded."""
    timing: str = field(default="given", kw_only=True)
    """Where the seconds come from: ``measured``, ``estimated`` or ``given``."""
    abilities: Abilities = field(default=_BY_ITS_OPS, kw_only=True)
    """What the engine that recorded the step can carry out. Where it is not said: reruns on behalf of what the
    backward asks for where there are such ops, and else anywhere."""
    measured_share: float = field(default=-1.0, kw_only=True)
    """The share of the seconds that was measured, here or by another process; the rest is estimated, or given. Where it
    is not said: all of what is ``measured``, nothing of the rest."""
    link: Link | None = field(default=None, kw_only=True)
    """The way to a slower tier, where values may be moved to; None where there is none."""

    def __post_init__(self) -> None:
        if self.abilities is _BY_ITS_OPS:
            object.__setattr__(self, "abilities", abilities_of(self.ops))
        if self.measured_share < 0:
            object.__setattr__(self, "measured_share", float(self.timing == "measured"))
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "ops", tuple(self.ops))
        _check(self)

    @cached_property
    def seconds(self) -> float:
        """Seconds of the plain program: the sum over its ops."""
        return sum(op.seconds for op in self.ops)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the values that are resident during the whole step."""
        return sum(v.nbytes for v in self.values if v.fixed)

    @cached_property
    def forward(self) -> tuple[int, ...]:
        """Indices of the ops of the forward, in program order."""
        return tuple(i for i, op in enumerate(self.ops) if op.phase == "forward")

    @cached_property
    def producer(self) -> tuple[int, ...]:
        """List, for every value, the op that writes it; -1 for none."""
        table = [-1] * len(self.values)
        for i, op in enumerate(self.ops):
            for v in op.writes:
                table[v] = i
        return tuple(table)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """List, for every value, the ops that read it, in program order."""
        table: list[list[int]] = [[] for _ in self.values]
        for i, op in enumerate(self.ops):
            for v in op.reads:
                table[v].append(i)
        return tuple(tuple(r) for r in table)

    @cached_property
    def hold(self) -> tuple[int, ...]:
        """List, for every value, the last op that it is held for.

        It is -1 when nothing holds the value.
        """
        last = len(self.ops) - 1
        return tuple(-1 if v.held is None else last if v.held == END else v.held for v in self.values)

    @cached_property
    def handed_until(self) -> tuple[int, ...]:
        """List, for every ``unpack``, until which op the backward keeps its answer.

        It is -1 for other ops.

        A node of the backward keeps the very copies that it was handed until its own ops have run, even where a
        rerun on behalf of a later ``unpack`` of the same node makes one of them once more. O(reads).
        """
        table = [-1] * len(self.ops)
        asked_together = list(accumulate(int(op.kind != "ask") for op in self.ops))
        for readers in self.readers:
            following, until = -1, -1
            for i in reversed(readers):
                if self.ops[i].kind != "ask":
                    until = max(until, i)
                    continue
                if until < 0 and following >= 0 and asked_together[following] == asked_together[i]:
                    until = table[following]
                table[i] = max(table[i], until, i)
                following, until = i, -1
        return tuple(table)

    @cached_property
    def call_begin(self) -> tuple[int, ...]:
        """List, for every op, the first op of its call.

        It is the op itself where that belongs to no call.
        """
        table: list[int] = []
        for i, op in enumerate(self.ops):
            joined = op.call >= 0 and i > 0 and self.ops[i - 1].call == op.call
            table.append(table[-1] if joined else i)
        return tuple(table)

    @cached_property
    def has_calls(self) -> bool:
        """Whether some call has several ops."""
        return any(begin < i for i, begin in enumerate(self.call_begin))

    @cached_property
    def available(self) -> tuple[int, ...]:
        """List, for every value, the op after which reruns hand it out.

        The rerun is one of its call; ``len(ops)`` stands for no op at all.
        """
        never = len(self.ops)
        own = (p if v.available is None else v.available for p, v in zip(self.producer, self.values, strict=True))
        return tuple(never if a == INSIDE else a for a in own)

    @cached_property
    def passing(self) -> frozenset[int]:
        """Collect the values that do not stay from forward to backward.

        Only their first copy must not.
        """
        return frozenset(v for v, value in enumerate(self.values) if value.passing)

    def label(self, value: int) -> str:
        """Name the value as a person would."""
        return self.values[value].label or self.values[value].id

    def module(self, value: int) -> str:
        """Return the path of the value's module; "" where none is known."""
        made_by = self.producer[value]
        return self.values[value].module or (self.ops[made_by].module if made_by >= 0 else "")

    def to_json(self, path: str | Path | None = None) -> str:
        """Write the program as JSON text, also to ``path`` if given.

        The format is ``autoremat-program``, version 2.
        """
        from autoremat.program.json_format import program_to_data, write_json

        return write_json(program_to_data(self), path)

    @staticmethod
    def from_json(source: str | Path | Mapping[str, Any]) -> Program:
        """Read a program from JSON text, a file, or parsed JSON data.

        Raises:
            InvalidProgram: wrong format or version, a missing field, a wrong type, an unknown id.
        """
        from autoremat.program.json_format import program_from_data, read_json

        return program_from_data(read_json(source))


def _check(program: Program) -> None:
    """Refuse what breaks the rules, naming the op or value."""
    if not 0 <= program.measured_share <= 1:
        raise InvalidProgram(f"measured_share is {program.measured_share}; a share is between 0 and 1")
    values = program.values
    _check_values(values, len(program.ops))
    written = {v for v, value in enumerate(values) if value.fixed}
    overwritten: dict[int, str] = {}
    for i, op in enumerate(program.ops):
        where = f"op {i} ({op.name})"
        _check_costs(where, op)
        _check_indices(where, (*op.reads, *op.writes), len(values))
        _check_reads(where, op, values, written, overwritten)
        _check_writes(where, op, values, written)
        _check_in_place(where, i, op, program)
        overwritten.update((old, where) for _, old in op.in_place)
    _check_calls(program)
    _check_available(program)


def _check_values(values: tuple[Value, ...], n_ops: int) -> None:
    seen: set[str] = set()
    for v in values:
        if v.id in seen:
            raise InvalidProgram(f"value id {v.id!r} is used twice")
        seen.add(v.id)
        if v.nbytes < 0:
            raise InvalidProgram(f"value {v.id!r}: bytes must not be negative, got {v.nbytes}")
        if v.held is not None and v.held != END and not 0 <= v.held < n_ops:
            raise InvalidProgram(f"value {v.id!r}: held names op {v.held}, but the program has {n_ops} ops")


def _check_costs(where: str, op: Op) -> None:
    if not 0 <= op.seconds < math.inf:
        raise InvalidProgram(f"{where}: seconds must be finite and not negative, got {op.seconds}")
    if op.scratch_bytes < 0:
        raise InvalidProgram(f"{where}: scratch_bytes must not be negative, got {op.scratch_bytes}")
    if not 0 <= op.again_seconds < math.inf:
        raise InvalidProgram(f"{where}: rerun_seconds must be finite and not negative, got {op.rerun_seconds}")
    if op.again_scratch_bytes < 0:
        raise InvalidProgram(f"{where}: rerun_scratch_bytes must not be negative, got {op.rerun_scratch_bytes}")


def _check_indices(where: str, indices: Iterable[int], n_values: int) -> None:
    for v in indices:
        if not 0 <= v < n_values:
            raise InvalidProgram(f"{where} names value number {v}, but the program has {n_values} values")


def _check_reads(
    where: str, op: Op, values: tuple[Value, ...], written: set[int], overwritten: Mapping[int, str]
) -> None:
    for v in op.reads:
        if v not in written:
            raise InvalidProgram(f"{where} reads value {values[v].id!r} before any op writes it; mark inputs as fixed")
        if v in overwritten:
            raise InvalidProgram(
                f"{where} reads value {values[v].id!r}, which {overwritten[v]} has overwritten in place; "
                "read the version written there, or leave that pair out of in_place"
            )


def _check_writes(where: str, op: Op, values: tuple[Value, ...], written: set[int]) -> None:
    """Refuse a second write of a value.

    What the op writes is added to ``written``.
    """
    for v in op.writes:
        if v in written:
            what = "is fixed" if values[v].fixed else "is already written"
            raise InvalidProgram(f"{where} writes value {values[v].id!r}, which {what}; give each version its own id")
        written.add(v)


def _check_in_place(where: str, i: int, op: Op, program: Program) -> None:
    """Refuse in-place pairs that no storage can follow.

    A taken-over value is gone once the op has run for the first time.
    """
    if any(new not in op.writes or old not in op.reads for new, old in op.in_place):
        raise InvalidProgram(f"{where}: in_place pairs must name a written and a read value")
    if any(len(set(side)) < len(op.in_place) for side in zip(*op.in_place, strict=True)):
        raise InvalidProgram(f"{where}: in_place names a value twice; one storage is taken over by one value")
    for _, old in op.in_place:
        value = program.values[old]
        if value.fixed:
            raise InvalidProgram(
                f"{where}: in_place takes over fixed value {value.id!r}, which never leaves; for an update of a fixed "
                "value let the op read it and write no new version"
            )
        if program.hold[old] > i:
            raise InvalidProgram(
                f"{where}: in_place takes over value {value.id!r}, which is held until op {program.hold[old]}; "
                f"held must end at op {i} at the latest"
            )


def _check_calls(program: Program) -> None:
    """Refuse calls that are interrupted, out of order, or in the backward."""
    before = -1
    for i, op in enumerate(program.ops):
        where = f"op {i} ({op.name})"
        if op.call < -1:
            raise InvalidProgram(f"{where}: call must be -1 or the number of a call, got {op.call}")
        if op.call >= 0 and op.phase == "backward":
            raise InvalidProgram(f"{where}: call is {op.call}, but an op of the backward belongs to no call")
        if op.call >= 0 and (op.call < before or (op.call == before and program.call_begin[i] == i)):
            raise InvalidProgram(
                f"{where}: call is {op.call}, but the call before was {before}; "
                "the ops of a call follow one another, and calls are numbered in the order they ran"
            )
        before = max(before, op.call)


def _check_available(program: Program) -> None:
    """Refuse values handed out too early, by another call, or nowhere."""
    for v, value in enumerate(program.values):
        made_by, where = program.producer[v], f"value {value.id!r}"
        if value.available is None:
            continue
        if made_by < 0 or program.ops[made_by].call < 0:
            raise InvalidProgram(f"{where}: available is for values that an op of a call writes")
        begin = program.call_begin[made_by]
        if value.available == INSIDE:
            outside = [i for i in program.readers[v] if program.call_begin[i] != begin]
            if outside:
                name = program.ops[outside[0]].name
                raise InvalidProgram(f"{where} never leaves its call, but op {outside[0]} ({name}) outside reads it")
        elif not made_by <= value.available < len(program.ops) or program.call_begin[value.available] != begin:
            raise InvalidProgram(
                f"{where}: available names op {value.available}; it must be op {made_by}, which writes the value, "
                "or a later one of the same call"
            )
