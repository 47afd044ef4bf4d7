"""Derives programs of steps that find gradients from programs without any."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torch import nn

from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.world.modules import named_tensors
from autoremat.program import END, Once, Op, Program, Value

ACCUMULATE: Final = "accumulate"
"""Name of the op that reads a gradient and hands it over.

It stands where the backward hands a leaf its gradient.
"""
_ADD: Final = "aten.add_.Tensor"
_LABEL: Final = ".grad "
_PASSES: Final = 3
"""Adding one tensor to another reads both and writes one."""


def gradients_there(modules: Sequence[nn.Module], left: Collection[str] = ()) -> dict[str, int]:
    """Return the bytes of existing gradients, by parameter name.

    Memory that several share counts once, by the name of one that is among ``left``.
    """
    return {next((n for n in names if n in left), names[-1]): nbytes for names, nbytes in _by_memory(modules)}


def gradients_found(program: Program) -> dict[str, int]:
    """Return the bytes of gradients a step finds, by parameter, in order."""
    return {v.label.split(_LABEL)[0]: v.nbytes for v in program.values if v.fixed and v.kind == "gradient"}


def _by_memory(modules: Sequence[nn.Module]) -> Iterator[tuple[list[str], int]]:
    found: dict[int, tuple[list[str], int]] = {}
    for name, _, tensor in named_tensors(modules):
        if nn.parameter.is_lazy(tensor) or not is_leaf(tensor) or tensor.grad is None:
            continue
        storage = storage_of(local_of(tensor.grad))
        if storage is not None:
            found.setdefault(storage._cdata, ([], storage.nbytes()))[0].append(name)
    yield from found.values()


def label_of(name: str, text: str) -> str:
    """Return the label of a parameter's gradient.

    ``text`` is its type and shape.
    """
    return f"{name}{_LABEL}{text}"


def gradients_left(program: Program) -> dict[str, int]:
    """Return the bytes of gradients the backward leaves, by parameter name."""
    return {name: program.values[v].nbytes for name, v in _left(program).items()}


def with_gradients(program: Program, there: Mapping[str, int]) -> Program:
    """Return the program of the same step with gradients already there.

    The gradients are in memory from the start; what the backward makes is added to them and goes, rather than stays. So
    at no moment is less in memory: a plan of this program serves a step that finds fewer gradients, too. Ops and values
    keep their places. O(program).

    Args:
        program: of a step that has found none, or some of them.
        there: bytes of gradients by name of the parameter; those that the backward does not reach just lie there.
    """
    known = gradients_found(program)
    there = {name: nbytes for name, nbytes in there.items() if name not in known}
    if not there:
        return program
    values, ops, left = list(program.values), list(program.ops), _left(program)
    rate = _seconds_per_byte(program)
    for name, nbytes in there.items():
        v = left.get(name)
        if v is None:
            values.append(_resident(name, nbytes, Value("", 0, label=label_of(name, ""))))
            continue
        made = program.values[v]
        values.append(_resident(name, nbytes, made))
        taking = _taking(program, v)
        add = Op(
            _ADD, (taking.source, len(values) - 1), (), rate * _PASSES * nbytes, phase="backward",
            once=Once.BACKWARD, module=ops[taking.begin].module, source=ops[taking.begin].source,
        )  # fmt: skip
        ops[taking.begin] = add
        if taking.source == v:
            values[v] = replace(made, kind="temporary", held=taking.begin)
        for i in range(taking.begin + 1, taking.end + 1):  # the ops of a copy that is not made now
            ops[i] = replace(ops[i], reads=tuple(w for _, w in ops[i].in_place), seconds=0.0, scratch_bytes=0)
            for w in ops[i].writes:
                values[w] = replace(values[w], nbytes=0, kind="temporary", held=None)
    return replace(program, values=tuple(values), ops=tuple(ops))


@dataclass(frozen=True)
class _Taking:
    """How a leaf takes a gradient.

    It takes it as it is, or copies it in a few ops; then ``end`` is after ``begin``.
    """

    source: int
    begin: int
    end: int


def _taking(program: Program, v: int) -> _Taking:
    """Find how a leaf took this gradient.

    If several share its memory, the last one counts.
    """
    ops = program.ops
    taken_at = [i for i in program.readers[v] if ops[i].name == ACCUMULATE]
    if taken_at:
        return _Taking(v, taken_at[-1], taken_at[-1])
    end = program.producer[v]
    begin = next(i for i in range(end, -1, -1) if ops[i].name == ACCUMULATE)
    return _Taking(ops[begin].reads[0], begin, end)


def _left(program: Program) -> dict[str, int]:
    """Return the gradient values the backward makes and leaves, by parameter name."""
    if not any(op.name == ACCUMULATE for op in program.ops):
        return {}
    return {
        value.label.split(_LABEL)[0]: v
        for v, value in enumerate(program.values)
        if value.kind == "gradient" and not value.fixed and value.held == END and _LABEL in value.label
    }


def _resident(name: str, nbytes: int, like: Value) -> Value:
    module = name.rpartition(".")[0]
    return replace(like, id=f"grad {name}", nbytes=nbytes, fixed=True, held=None, available=None, kind="gradient",
                   module=module)  # fmt: skip


def _seconds_per_byte(program: Program) -> float:
    """Return the seconds per moved byte of the program's fastest op."""
    values = program.values
    moved = ((op.seconds, sum(values[v].nbytes for v in (*op.reads, *op.writes))) for op in program.ops)
    return min((seconds / nbytes for seconds, nbytes in moved if seconds and nbytes), default=0.0)
