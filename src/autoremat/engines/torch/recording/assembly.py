"""Assembles a ``Program`` from a recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from autoremat.engines.torch.operators.costs import Cost
from autoremat.engines.torch.operators.numbers import saved_number_bytes
from autoremat.engines.torch.recording.recording import RecordedOp, RecordedValue, Recording
from autoremat.program import END, Once, Op, Program, Value
from autoremat.program.once import Reason

OPTIMIZER_STEP: Final = "optimizer step"
"""Name of the last op, which accounts for the optimizer's step."""


def assemble(
    recording: Recording, name: str, costs: Sequence[Cost], *, optimizer_state_bytes: int = 0,
    optimizer_scratch_bytes: int = 0, beside: Mapping[str, int] | None = None, timing: str, recorded: str = "fake",
) -> Program:  # fmt: skip
    """Assemble the program of a finished recording.

    Args:
        recording: a finished one.
        name: name of the program.
        costs: seconds and scratch bytes of every recorded op.
        optimizer_state_bytes: resident state of the optimizer.
        optimizer_scratch_bytes: temporaries of the optimizer's step; if there are any, the program gets a last op.
        beside: bytes of whatever else is always resident, by label.
        timing: where the seconds come from.
        recorded: ``fake`` or ``real``, the tensors of the recording.
    """
    device = main_device(recording.values)
    outside = sorted((n for n in recording.values if n < 0), reverse=True)
    made = range(recording.made)
    index = {n: i for i, n in enumerate([*outside, *made])}
    names = _names(recording, [*outside, *made])
    values = [_value(n, names[n], recording.values[n], device) for n in [*outside, *made]]
    number_bytes = saved_number_bytes(recording.calls_with_numbers) if device.type == "cpu" else 0
    if number_bytes:
        label = "numbers that autograd saves"
        values.append(Value("autograd.numbers", number_bytes, fixed=True, label=label, kind="input"))
    if optimizer_state_bytes:
        values.append(
            Value("optimizer.state", optimizer_state_bytes, fixed=True, label="optimizer state", kind="optimizer")
        )
    for label, nbytes in (beside or {}).items():
        values.append(Value(f"distributed.{len(values)}", nbytes, fixed=True, label=label, kind="distributed"))
    reasons = _reasons(recording)
    ops = [
        Op(
            name=op.name,
            reads=tuple(index[n] for n in op.reads),
            writes=tuple(index[n] for n in op.writes),
            seconds=cost.seconds,
            scratch_bytes=cost.scratch_bytes,
            phase="backward" if op.backward else "forward",
            once=None if reason is None else reason.once,
            note="" if reason is None else reason.note,
            kind="ask" if op.is_ask else "op",
            in_place=tuple((index[a], index[b]) for a, b in op.in_place),
            module=op.module,
            source=op.source,
            call=op.call,
        )
        for op, cost, reason in zip(recording.ops, costs, reasons, strict=True)
    ]
    if optimizer_scratch_bytes:
        step = Op(
            OPTIMIZER_STEP, (), (), 0.0, optimizer_scratch_bytes, phase="backward", once=Once.BACKWARD, kind="step"
        )  # fmt: skip
        ops.append(step)
    total, timed = sum(cost.seconds for cost in costs), sum(cost.seconds for cost in costs if cost.runs)
    share = timed / total if total else 0.0
    return Program(name, tuple(values), tuple(ops), timing=timing, measured_share=share, recorded=recorded)


def main_device(values: dict[int, RecordedValue]) -> torch.device:
    """Return the device the budget is for: the accelerator if used."""
    devices = {v.device for v in values.values()}
    return next((d for d in devices if d.type not in ("cpu", "meta")), torch.device("cpu"))


def _names(recording: Recording, numbers: Sequence[int]) -> dict[int, str]:
    """Give every value a unique name that a user can recognise.

    A parameter has its own name; what an op makes is named after module and operator.
    """
    maker = {n: op for op in recording.ops for n in op.writes}
    names: dict[int, str] = {}
    taken: set[str] = set()
    copies: dict[str, int] = {}
    for n in numbers:
        value = recording.values[n]
        op = maker.get(n)
        if op is not None and value.kind != "gradient":
            name = ".".join(filter(None, (op.module, op.name.removeprefix("aten.").partition(".")[0])))
        else:
            name = value.label.partition(" " + value.dtype)[0].replace(" ", ".")
        name = name or ("memory" if n >= 0 else "outside")
        base = name
        while name in taken:
            copies[base] = copies.get(base, 1) + 1
            name = f"{base}.{copies[base]}"
        names[n] = name
        taken.add(name)
    return names


def _value(number: int, name: str, value: RecordedValue, device: torch.device) -> Value:
    nbytes = value.nbytes if value.device == device else 0
    about: dict[str, Any] = {"label": value.label, "kind": value.kind, "dtype": value.dtype, "shape": value.shape}
    about["module"] = value.module
    if number < 0:
        return Value(name, nbytes, fixed=True, **about)
    held: int | None = END if value.forever else None
    if held is None and value.died is not None:
        held = max(value.died - 1, 0)
    return Value(name, nbytes, held=held, available=value.available, **about)


def _reasons(recording: Recording) -> list[Reason | None]:
    """Say for every op why it must not be rerun, if so."""
    taken_over_by = {old: i for i, op in enumerate(recording.ops) for _, old in op.in_place if not op.backward}
    benign = _overwritten_at_once(recording.ops)
    lost: set[int] = set()  # values overwritten in place that no rerun can make
    reasons: list[Reason | None] = []
    for op in recording.ops:
        reason = _reason(op, recording, lost, benign)
        if reason:
            lost.update(n for n in op.writes if n in taken_over_by)
        reasons.append(reason)
    return reasons


def _reason(op: RecordedOp, recording: Recording, lost: set[int], benign: set[int]) -> Reason | None:
    facts = op.facts
    if op.backward or facts is None:
        return Reason(Once.BACKWARD)
    if facts.once:
        return facts.once
    if not recording.changed_unseen.isdisjoint(op.writes):
        return Reason(Once.MADE_IS_CHANGED)
    if not recording.changed_unseen.isdisjoint(op.reads):
        return Reason(Once.READ_IS_CHANGED)
    if op.opaque:
        return Reason(Once.OPAQUE)
    if facts.batch_norm:
        return Reason(Once.STATISTICS_NOT_BUFFERS) if op.in_place else _stale(op, recording, skip=True)
    if op.effects:
        return Reason(Once.OVERWRITES, recording.values[op.effects[0]].label)
    if facts.uninitialised and not set(op.writes) <= benign:
        return Reason(Once.UNINITIALISED)
    for n in op.reads:
        if n in lost:
            return Reason(Once.READS_TAKEN_OVER, recording.values[n].label)
    return _stale(op, recording, skip=False)


def _stale(op: RecordedOp, recording: Recording, *, skip: bool) -> Reason | None:
    """Find an input from outside that the step overwrites.

    Running statistics are not read in training. An input that was overwritten before the op counts too: the next
    forward overwrites it again, perhaps before this step's backward.
    """
    if skip and op.effects:
        return None
    for n in op.reads:
        if n < 0 and n in recording.overwritten:
            return Reason(Once.READS_OVERWRITTEN, recording.values[n].label)
    return None


def _overwritten_at_once(ops: Sequence[RecordedOp]) -> set[int]:
    """Find uninitialised values that are fully overwritten before they are read."""
    first_reader: dict[int, RecordedOp] = {}
    for op in ops:
        for n in op.reads:
            first_reader.setdefault(n, op)
    made = {n for op in ops if op.facts is not None and op.facts.uninitialised for n in op.writes}
    return {
        n
        for n in made
        if (reader := first_reader.get(n)) and reader.covers_all and any(old == n for _, old in reader.in_place)
    }
