"""What is in memory during one run, and why, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from autoremat.program import Op, Program, Schedule
from autoremat.program.lifetimes import block_ends

CATEGORIES: Final = (
    "parameters",
    "buffers",
    "inputs",
    "optimizer state",
    "gradients",
    "saved activations",
    "recomputed activations",
    "temporaries",
    "scratch",
)
"""What may fill memory, in the order in which it is listed."""

KIND_CATEGORIES: Final = {
    "parameter": "parameters",
    "buffer": "buffers",
    "input": "inputs",
    "optimizer": "optimizer state",
    "gradient": "gradients",
}


@dataclass(frozen=True, slots=True)
class Resident:
    """Something in memory: a copy of a value, or an op's scratch.

    Attributes:
        value: index in ``Program.values``; -1 for scratch.
        nbytes: what it takes. All residents together are what ``simulate`` says for that run.
        category: one of ``CATEGORIES``.
        name: what a person calls it, such as ``blocks.3.mlp.0.weight`` or ``blocks.3.mlp.1 gelu``.
        dtype: such as ``float32``; "" where that is not known.
        shape: None where that is not known.
        module: path of the module that it belongs to.
        source: ``file:line`` of the code that made it.
        made_by: index of the op that made it; -1 for what was there before the step.
        why: why it is in memory, as a sentence without a subject.
        readers: indices of the ops that read this copy later on, in the order in which they run.
    """

    value: int
    nbytes: int
    category: str
    name: str
    dtype: str
    shape: tuple[int, ...] | None
    module: str
    source: str
    made_by: int
    why: str
    readers: tuple[int, ...]

    @property
    def type(self) -> str:
        """Say type and shape, such as ``float32[8, 64]``; "" where unknown."""
        return type_text(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A value in memory, with its size, its writer and its readers.

    The run that wrote it is -1 where it was there from the start; the readers are those from here on.
    """

    value: int
    nbytes: int
    run: int
    readers: tuple[int, ...]


def type_text(dtype: str, shape: tuple[int, ...] | None) -> str:
    """``float32[8, 64]``; "" where one of them is not known."""
    return "" if not dtype or shape is None else f"{dtype}[{', '.join(map(str, shape))}]"


def op_text(op: Op) -> str:
    """Name module and operator, such as ``blocks.3.mlp.1 gelu``.

    It is the plain name where the program has no modules.
    """
    name = op.name.removeprefix("aten.").removesuffix(".default")
    return f"{op.module} {name}" if op.module else name


def name_of(program: Program, value: int) -> str:
    """Name a value for people.

    That is its label without type and shape; of a recorded op's output, module and operator.
    """
    made_by, v = program.producer[value], program.values[value]
    name = program.label(value).removesuffix(f" {type_text(v.dtype, v.shape)}")
    op = program.ops[made_by] if made_by >= 0 else None
    return op_text(op) if op is not None and name == (op.module or op.name) else name


def residents_at(program: Program, schedule: Schedule, run: int) -> tuple[Resident, ...]:
    """List what is in memory during the given run, largest first.

    Run -1 is the beginning of an empty schedule.

    O(runs + reads).
    """
    moment = _Moment(program, schedule, run)
    found = [_resident(moment, copy) for copy in _copies(moment)]
    if moment.scratch_bytes:
        found.append(_scratch(moment))
    return tuple(sorted(found, key=lambda r: (-r.nbytes, r.value)))


@dataclass(frozen=True)
class _Moment:
    """One run of a schedule."""

    program: Program
    schedule: Schedule
    run: int

    @cached_property
    def op(self) -> Op:
        """What runs."""
        return self.program.ops[self.schedule.order[self.run]] if self.run >= 0 else Op("", (), ())

    @property
    def scratch_bytes(self) -> int:
        """Temporary bytes of what runs."""
        return self.op.again_scratch_bytes if self.run in self.reruns else self.op.scratch_bytes

    @cached_property
    def frees(self) -> tuple[int, ...]:
        """What leaves after it."""
        return self.schedule.frees[self.run] if self.run >= 0 else ()

    @property
    def away(self) -> frozenset[int]:
        """Values that are in a slower tier while it happens."""
        return frozenset(o.value for o in self.schedule.offloads if o.gone < self.run < o.fetch)

    @cached_property
    def reached(self) -> int:
        """The last op of the program that has begun to run."""
        return max(self.schedule.order[: self.run + 1], default=-1)

    @cached_property
    def reruns(self) -> frozenset[int]:
        """List the reruns so far, this run included."""
        seen: set[int] = set()
        found = set()
        for q, i in enumerate(self.schedule.order[: self.run + 1]):
            if i in seen:
                found.add(q)
            seen.add(i)
        return frozenset(found)


def _copies(moment: _Moment) -> Iterator[_Copy]:
    """Account for one run as ``simulate`` does, copy by copy."""
    nbytes = [v.nbytes for v in moment.program.values]
    op, written_by = moment.op, _written_by(moment)
    taken_over = {new: old for new, old in op.in_place if old in moment.frees}
    readers = _later_readers(moment, {*written_by, *op.writes})
    for v, q in written_by.items():
        if v not in taken_over.values() and v not in moment.away:
            yield _Copy(v, nbytes[v], q, () if v in op.writes else tuple(readers[v]))
    yield from _twice(moment)
    for v in op.writes:
        old = taken_over.get(v)
        yield _Copy(v, nbytes[v] if old is None else max(nbytes[v], nbytes[old]), moment.run, tuple(readers[v]))


def _twice(moment: _Moment) -> Iterator[_Copy]:
    """Collect what a rerun of a call has made a second time.

    It was in memory before the call began to run again.
    """
    if not moment.program.has_calls:
        return
    end = block_ends(moment.program, moment.schedule.order)
    begin = moment.run
    while begin > 0 and end[begin - 1] == end[moment.run]:
        begin -= 1
    for q in range(begin, moment.run):
        before = _written_by(replace(moment, run=q))
        for v in moment.program.ops[moment.schedule.order[q]].writes:
            if v in before:
                yield _Copy(v, moment.program.values[v].nbytes, before[v], ())


def _written_by(moment: _Moment) -> dict[int, int]:
    """Find the run that wrote each value in memory before this run."""
    table = {v: -1 for v, value in enumerate(moment.program.values) if value.fixed}
    for q in range(max(moment.run, 0)):
        table.update((v, q) for v in moment.program.ops[moment.schedule.order[q]].writes)
        for v in moment.schedule.frees[q]:
            del table[v]
    return table


def _later_readers(moment: _Moment, values: set[int]) -> dict[int, list[int]]:
    """Find, for every value, the ops that read it after the run.

    They count up to where it is freed or written again.
    """
    table: dict[int, list[int]] = {v: [] for v in values}
    alive = values.difference(moment.frees)
    order, frees = moment.schedule.order, moment.schedule.frees
    for q in range(moment.run + 1, len(order)):
        op = moment.program.ops[order[q]]
        for v in alive.intersection(op.reads):
            table[v].append(order[q])
        alive.difference_update(op.writes, frees[q])
    return table


def _resident(moment: _Moment, copy: _Copy) -> Resident:
    program, value = moment.program, moment.program.values[copy.value]
    made_by = program.producer[copy.value]
    return Resident(
        value=copy.value,
        nbytes=copy.nbytes,
        category=_category(moment, copy),
        name=name_of(program, copy.value),
        dtype=value.dtype,
        shape=value.shape,
        module=program.module(copy.value),
        source=program.ops[made_by].source if made_by >= 0 else "",
        made_by=made_by,
        why=_why(moment, copy),
        readers=copy.readers,
    )


def _scratch(moment: _Moment) -> Resident:
    op, i = moment.op, moment.schedule.order[moment.run]
    return Resident(
        -1, moment.scratch_bytes, "scratch", f"scratch of {op_text(op)}", "", None, op.module, op.source, i,
        "used inside the kernel that runs", (),
    )  # fmt: skip


def _category(moment: _Moment, copy: _Copy) -> str:
    program, value = moment.program, moment.program.values[copy.value]
    if value.kind in KIND_CATEGORIES or value.fixed:
        return KIND_CATEGORIES.get(value.kind, "inputs")
    if copy.run in moment.reruns:
        return "recomputed activations"
    return "saved activations" if _is_saved(program, copy, moment) else "temporaries"


def _is_saved(program: Program, copy: _Copy, moment: _Moment) -> bool:
    """Tell whether a forward's copy is still read by backward or reruns.

    It is read now or later.
    """
    if program.ops[program.producer[copy.value]].phase != "forward":
        return False
    if copy.value in moment.op.reads and (moment.op.phase == "backward" or moment.run in moment.reruns):
        return True
    # An op up to the one reached runs again if it is still to come.
    return any(program.ops[i].phase == "backward" or i <= moment.reached for i in copy.readers)


def _why(moment: _Moment, copy: _Copy) -> str:
    """Choose the first of the reasons that holds."""
    program, v = moment.program, copy.value
    if program.values[v].fixed:
        return "there during the whole step"
    if copy.run == moment.run:
        return "being written"
    if v in moment.op.writes:
        return "about to be replaced by the copy that is being written"
    asks = [program.ops[i] for i in copy.readers if program.ops[i].kind == "ask"]
    if asks:
        place = asks[0].module or asks[0].source.rpartition("/")[2]
        return f"saved for the backward of {place}" if place else "saved for the backward"
    if v in moment.op.reads:
        return "being read"
    if copy.readers:
        return f"waits for {op_text(program.ops[copy.readers[0]])}"
    return _held(moment, v)


def _held(moment: _Moment, v: int) -> str:
    program, until = moment.program, moment.program.hold[v]
    if until < moment.reached:
        return "left in memory by the schedule"
    if program.values[v].kind == "gradient":
        return "a gradient stays to the end of the step"
    if until == len(program.ops) - 1:
        return "held by Python to the end of the step"
    return f"held by Python or autograd until {op_text(program.ops[until])}"


def short_source(source: str) -> str:
    """Cut a file's path down to the file and its folder.

    Whoever gets a page or a text learns nothing about the machine that made it.
    """
    return "/".join(source.replace("\\", "/").split("/")[-2:])
