"""``Schedule``: what really happens, runs of ops with the frees after each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from autoremat.program.errors import InvalidSchedule
from autoremat.program.lifetimes import Lifetimes
from autoremat.program.model import Program


@dataclass(frozen=True, slots=True)
class Run:
    """Run op ``op``; what it writes is in memory from now on."""

    op: int


@dataclass(frozen=True, slots=True)
class Free:
    """Let value ``value`` leave memory."""

    value: int


Action = Run | Free


@dataclass(frozen=True)
class Schedule:
    """The runs of a step, and after each what leaves memory.

    Attributes:
        order: op indices in the order they run, repeats included.
        frees: for every run, the values that are freed right after it (same length as ``order``).
    """

    order: tuple[int, ...]
    frees: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))
        object.__setattr__(self, "frees", tuple(tuple(f) for f in self.frees))
        if len(self.order) != len(self.frees):
            raise InvalidSchedule(
                f"a schedule needs one entry of frees per run: {len(self.frees)} for {len(self.order)}"
            )

    @staticmethod
    def plain(program: Program) -> Schedule:
        """Run every op once; free each value after its last reader."""
        return Schedule.from_order(program, range(len(program.ops)))

    @staticmethod
    def from_order(program: Program, order: Sequence[int]) -> Schedule:
        """Free every value as early as the order of runs allows.

        A value stays from the run that writes it until the last run that reads it before it is written again, and
        the first copy at least as long as the value is held. A value that an op takes over in place leaves with the
        first run of that op, even where a later run reads it: such an order cannot be carried out, and ``simulate``
        and ``verify`` say so. Where ops of a call run again, C++ keeps values inside of the call as in the first run
        (``lifetimes``). O(runs + reads).

        Raises:
            InvalidSchedule: the order names an op that does not exist.
        """
        order = tuple(order)
        frees = Lifetimes(program, order, _first_runs(program, order)).frees
        return Schedule(order, tuple(tuple(sorted(f)) for f in frees))

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """List the runs, and after each what is freed."""
        found = list[Action]()
        for i, frees in zip(self.order, self.frees, strict=True):
            found += [Run(i), *map(Free, frees)]
        return tuple(found)

    @staticmethod
    def of_actions(actions: Iterable[Action]) -> Schedule:
        """Make a schedule of a list of actions.

        Raises:
            InvalidSchedule: something is freed before anything has run.

        Example:
            >>> schedule = Schedule.of_actions([Run(0), Run(1), Free(2)])
            >>> schedule.order, schedule.frees, len(schedule.actions)
            ((0, 1), ((), (2,)), 3)
        """
        order, frees = list[int](), list[list[int]]()
        for action in actions:
            if isinstance(action, Run):
                order.append(action.op)
                frees.append([])
            elif frees:
                frees[-1].append(action.value)
            else:
                raise InvalidSchedule(f"value {action.value} is freed before anything has run")
        return Schedule(tuple(order), tuple(map(tuple, frees)))

    @cached_property
    def runs_of(self) -> dict[int, int]:
        """How often each op runs."""
        counts: dict[int, int] = {}
        for i in self.order:
            counts[i] = counts.get(i, 0) + 1
        return counts

    def extra_seconds(self, program: Program) -> float:
        """Add up the seconds of the reruns alone."""
        return sum((n - 1) * program.ops[i].again_seconds for i, n in self.runs_of.items())


def _first_runs(program: Program, order: Sequence[int]) -> dict[int, int]:
    """Find, for every op of the order, its first run."""
    first: dict[int, int] = {}
    for p, i in enumerate(order):
        if not 0 <= i < len(program.ops):
            raise InvalidSchedule(f"run {p} names op {i}, but the program has {len(program.ops)} ops")
        first.setdefault(i, p)
    return first
