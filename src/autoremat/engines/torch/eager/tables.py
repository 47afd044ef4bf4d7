"""Tables of a script: a plan's bytes and seconds.

They go by call, or by request of the backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from autoremat.engines.torch.eager.stays import Stays
from autoremat.program import Plan, Program, Timeline, simulate


def stops_of(program: Program, number: dict[int, int]) -> frozenset[int]:
    """Find values that a rerun hands out before its call's end."""
    end = {op.call: i for i, op in enumerate(program.ops) if op.call >= 0}
    found = set()
    for v, n in number.items():
        available, maker = program.values[v].available, program.producer[v]
        if available is not None and 0 <= available < end.get(program.ops[maker].call, -1):
            found.add(n)
    return frozenset(found)


def costs_of(program: Program, n_calls: int) -> tuple[tuple[float, int], ...]:
    """Return, for every call, a rerun's seconds and its bytes.

    The bytes are the most that it takes on top of what is there before: temporaries, and copies of what it overwrites.
    """
    seconds, most, copies, before = [0.0] * n_calls, [0] * n_calls, [0] * n_calls, dict[int, int]()
    for i, resident in zip(program.forward, simulate(program).resident_bytes, strict=False):
        op = program.ops[i]
        if 0 <= op.call < n_calls:
            overwritten = sum(program.values[old].nbytes for _, old in op.in_place)
            made = op.scratch_bytes + sum(program.values[v].nbytes for v in op.writes) - overwritten
            before.setdefault(op.call, resident - made)
            most[op.call] = max(most[op.call], made, resident - before[op.call])
            copies[op.call] += overwritten
            seconds[op.call] += op.again_seconds
    return tuple((s, m + c) for s, m, c in zip(seconds, most, copies, strict=True))


def run_twice(plan: Plan, timeline: Timeline, ready: frozenset[int]) -> frozenset[int]:
    """Find calls that can be rerun at once within the budget.

    Their results, and copies of what they overwrite, fit in a second time.
    """
    resident: dict[int, int] = {}
    written: Counter[int] = Counter()
    for i, nbytes in zip(plan.schedule.order, timeline.resident_bytes, strict=True):
        call = plan.program.ops[i].call
        if call in ready and i not in resident:
            resident[i] = nbytes
    worst: dict[int, int] = {}
    for i, nbytes in resident.items():
        op = plan.program.ops[i]
        worst[op.call] = max(worst.get(op.call, 0), nbytes)
        written[op.call] += sum(plan.program.values[v].nbytes for v in op.writes)
        written[op.call] += sum(plan.program.values[old].nbytes for _, old in op.in_place)
    return frozenset(k for k, nbytes in worst.items() if nbytes + written[k] <= plan.budget_bytes)


def beside_bytes(stays: Stays, timeline: Timeline) -> tuple[int, ...]:
    """Return the most bytes besides the tape's values, for each span.

    The first span is the forward, the others go from each request to the next. What reruns take is not included: off
    the path there are others, and room is left for those.
    """
    found, seen = [0], set[int]()
    for i, resident, held in zip(stays.order, timeline.resident_bytes, _held_bytes(stays), strict=False):
        if stays.program.ops[i].kind == "ask":
            found.append(0)
        if i not in seen:
            found[-1] = max(found[-1], resident - held)
        seen.add(i)
    return tuple(found)


def asked_bytes(stays: Stays, timeline: Timeline) -> tuple[int, ...]:
    """Return the bytes besides the tape's values, at each request.

    The first entry is what kernels take in the forward.
    """
    program = stays.program
    scratch = max((program.ops[i].scratch_bytes for i in program.forward), default=0)
    found = [program.fixed_bytes + scratch]
    for i, resident, there in zip(stays.order, timeline.resident_bytes, _held_bytes(stays), strict=False):
        if program.ops[i].kind == "ask":
            found.append(max(program.fixed_bytes, resident - there))
    return tuple(found)


def _held_bytes(stays: Stays) -> list[int]:
    """Return the bytes of values that the tape holds, at every run."""
    change = [0] * (len(stays.order) + 1)
    for v, ss in stays.by_value.items():
        for s in ss:
            ends = [p for p in (s.last_read, *s.asks) if p is not None]
            if ends:
                change[s.made_at] += stays.program.values[v].nbytes
                change[max(ends) + 1] -= stays.program.values[v].nbytes
    return list(accumulate(change))


def gradient_bytes(program: Program, order: Sequence[int]) -> tuple[int, ...]:
    """Return the bytes of parameters' gradients from each request on.

    The first entry is for the forward.
    """
    found, last = [0], 0
    for i in order:
        op = program.ops[i]
        if op.kind == "ask":
            found.append(last)
        taken_over = {new for new, _ in op.in_place}
        made = (program.values[v] for v in op.writes if v not in taken_over)
        last += sum(value.nbytes for value in made if value.kind == "gradient")
    return tuple(found)


def saved_bytes(stays: Stays, n_calls: int) -> tuple[int, ...]:
    """Return, after each call, the bytes autograd keeps outside the tape."""
    found = [0] * (n_calls + 1)
    for v, (first, *_) in stays.by_value.items():
        call = stays.program.ops[stays.program.producer[v]].call
        if first.last_read is None and first.asks and 0 <= call < n_calls:
            found[call + 1] += stays.program.values[v].nbytes
    return tuple(accumulate(found))


def places_of(program: Program, n_calls: int) -> tuple[str, ...]:
    """Describe every call by its operator, module and line."""
    found = [""] * n_calls
    for i in program.forward:
        op = program.ops[i]
        if 0 <= op.call < len(found):
            found[op.call] = f"{op.name} in {op.module or 'the step'} ({op.source or 'unknown line'})"
    return tuple(found)
