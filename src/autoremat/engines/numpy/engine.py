"""Records lists of calls as programs, and carries out their plans.

Plans are carried out run by run and free by free.

No framework keeps anything here, so there is nothing to hear, to hook or to hide: whoever writes an engine can read
what a schedule means from ``carry_out``, and every solver's plans are tried under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autoremat.engines.numpy.tier import AtOnce, Tier
from autoremat.program import (
    END,
    Abilities,
    Fetch,
    Gone,
    Here,
    Once,
    Op,
    Plan,
    Program,
    Schedule,
    Send,
    Value,
)

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Call:
    """One line of a step: ``writes = fn(*reads)``.

    Attributes:
        name: of what is done.
        fn: takes the arrays read, and returns a sequence of those written.
        reads: names of arrays.
        writes: names of arrays, each written by one call only.
        phase: ``forward`` or ``backward``.
        once: why the call must not be made again; None when it may, and it is of the forward.
        in_place: pairs (written, read): the function returns the memory of what it reads, overwritten.
        seconds: that it takes.
    """

    name: str
    fn: Callable[..., Sequence[Array]]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    phase: str = "forward"
    once: Once | None = None
    in_place: tuple[tuple[str, str], ...] = ()
    seconds: float = 1.0


@dataclass(frozen=True)
class Step:
    """Lists the calls of a step, and its arrays by name."""

    name: str
    calls: tuple[Call, ...]
    inputs: Mapping[str, Array]


class Numpy:
    """Carries out every schedule in its order."""

    name = "numpy"
    abilities = Abilities()

    def record(self, step: Step) -> Program:
        """Record a step by running it once."""
        return record(step.name, step.calls, step.inputs)

    def carry_out(self, step: Step, plan: Plan) -> Callable[[], dict[str, Array]]:
        """Make a callable that runs the step by the plan.

        It returns the arrays that are left, by name.
        """
        values, ops = [v.id for v in plan.program.values], plan.program.ops
        planned = [(o.name, tuple(values[r] for r in o.reads), tuple(values[w] for w in o.writes)) for o in ops]
        if planned != [(c.name, c.reads, c.writes) for c in step.calls]:
            raise ValueError(f"the plan is of {plan.program.name!r}, which has other calls than {step.name!r}")
        return lambda: carry_out(plan, step.calls, step.inputs)


ENGINE = Numpy()


def record(name: str, calls: Sequence[Call], inputs: Mapping[str, Array]) -> Program:
    """Run a step once and make its program by the sizes.

    What no call reads is a result, and stays.

    Args:
        name: of the step.
        calls: in order; those of the backward are made once, whatever the plan.
        inputs: arrays by name; they stay for the whole step.

    Example:
        >>> import numpy as np
        >>> double = Call("double", lambda a: [2 * a], ("x",), ("y",))
        >>> record("tiny", [double], {"x": np.ones(8)}).values[1].nbytes
        64
    """
    memory, values = dict(inputs), [Value(n, a.nbytes, fixed=True) for n, a in inputs.items()]
    read = {name for call in calls for name in call.reads}
    for call in calls:
        copied = [memory[r].copy() if r in dict(call.in_place).values() else memory[r] for r in call.reads]
        memory.update(zip(call.writes, call.fn(*copied), strict=True))
        values += [Value(w, memory[w].nbytes, held=None if w in read else END) for w in call.writes]
    index = {value.id: v for v, value in enumerate(values)}
    ops = tuple(
        Op(
            call.name, tuple(index[r] for r in call.reads), tuple(index[w] for w in call.writes), call.seconds,
            phase=call.phase, once=call.once or (None if call.phase == "forward" else Once.BACKWARD),
            in_place=tuple((index[new], index[old]) for new, old in call.in_place),
        )
        for call in calls
    )  # fmt: skip
    return Program(name, tuple(values), ops)


def carry_out(
    plan: Plan, calls: Sequence[Call], inputs: Mapping[str, Array], tier: Tier | None = None
) -> dict[str, Array]:
    """Run the calls in a plan's order; free and move arrays.

    The plan says which arrays, and when.

    Args:
        plan: for the program of these calls.
        calls: as recorded.
        inputs: as recorded, or others of the same sizes.
        tier: where the plan moves arrays to; memory of Python's unless given.

    Returns:
        The arrays that are left, by name, the inputs among them.
    """
    program, schedule = plan.program, plan.schedule
    names = [value.id for value in program.values]
    memory, copies, seen = dict(inputs), list[Array](), set[int]()
    moving = _Moving(names, memory, AtOnce() if tier is None else tier)
    for p, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        op, leaving = program.ops[i], {names[v] for v in frees if program.values[v].held != END}
        if not _goes_on(program, schedule, p, seen):
            copies.clear()
        moving.carry_out(p, schedule)
        _run(calls[i], {names[old] for _, old in op.in_place} - leaving, memory, copies)
        seen.add(i)
        for name in leaving:
            del memory[name]
    return memory


class _Moving:
    """Values of a step in the tier, or on their way."""

    def __init__(self, names: Sequence[str], memory: dict[str, Array], tier: Tier) -> None:
        self._names, self._memory, self._tier = names, memory, tier
        self._forms: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {}
        self._coming: dict[str, Array] = {}

    def carry_out(self, p: int, schedule: Schedule) -> None:
        """Move what moves ahead of a run."""
        for event in (*schedule.moves[p][0], *schedule.moves[p][1]):
            name = self._names[event.value]
            match event:
                case Send():
                    self._tier.send(name, self._memory[name])
                case Gone():
                    self._tier.sent(name)
                    array = self._memory.pop(name)
                    self._forms[name] = array.dtype, array.shape
                case Fetch():
                    dtype, shape = self._forms.pop(name)
                    self._coming[name] = np.empty(shape, dtype)
                    self._tier.fetch(name, self._coming[name])
                case Here():
                    self._tier.fetched(name)
                    self._memory[name] = self._coming.pop(name)


def _run(call: Call, needed: set[str], memory: dict[str, Array], copies: list[Array]) -> None:
    """Make one call; what is needed afterwards it overwrites in a copy.

    What is there already stays, and what the call makes once more goes when it is through.
    """
    made = call.fn(*[memory[r].copy() if r in needed else memory[r] for r in call.reads])
    copies += [array for name, array in zip(call.writes, made, strict=True) if name in memory]
    memory.update((name, array) for name, array in zip(call.writes, made, strict=True) if name not in memory)


def _goes_on(program: Program, schedule: Schedule, p: int, seen: set[int]) -> bool:
    """Tell whether a run is a rerun from a call's middle."""
    i = schedule.order[p]
    return i in seen and program.call_begin[i] < i and schedule.order[p - 1] == i - 1
