"""``Schedule``: what really happens, runs of ops with the frees after each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Send:
    """Begin to copy value ``value`` to the tier; its bytes stay."""

    value: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Wait for the copy of value ``value`` to the tier.

    From now on its memory is free.
    """

    value: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Take memory for value ``value``; begin the copy back.

    It comes from the tier.
    """

    value: int


@dataclass(frozen=True, slots=True)
class Here:
    """Wait for the copy of value ``value`` from the tier.

    From now on it can be read.
    """

    value: int


Action = Run | Free | Send | Gone | Fetch | Here


@dataclass(frozen=True, slots=True)
class Offload:
    """One stay of a value in a slower tier.

    It has the positions in ``Schedule.order`` at which the value goes and comes.

    Bytes follow from the order alone, so however slow the link is, the peak is the same.

    Attributes:
        value: that goes.
        send: the run after which its copy out begins (``Send``).
        gone: the run after which that copy is waited for, and the memory is free (``Gone``).
        fetch: the run before which it takes memory again, and its copy back begins (``Fetch``).
        here: the run before which that copy is waited for (``Here``).
    """

    value: int
    send: int
    gone: int
    fetch: int
    here: int


@dataclass(frozen=True)
class Schedule:
    """The runs of a step, and after each what leaves memory.

    Attributes:
        order: op indices in the order they run, repeats included.
        frees: for every run, the values that are freed right after it (same length as ``order``).
        offloads: stays of values in a slower tier; ``frees`` has nothing of these. Of events at one place, copies out
            come first, and copies back go by when they are waited for.
    """

    order: tuple[int, ...]
    frees: tuple[tuple[int, ...], ...]
    offloads: tuple[Offload, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.order))
        object.__setattr__(self, "frees", tuple(tuple(f) for f in self.frees))
        object.__setattr__(self, "offloads", tuple(self.offloads))
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
    def moves(self) -> tuple[tuple[tuple[Send | Gone, ...], tuple[Fetch | Here, ...]], ...]:
        """Moves between every run and the run before.

        One more entry is for the end.

        First what follows the run before, then what goes ahead of this one.
        """
        n = len(self.order)
        after: list[list[Send | Gone]] = [[] for _ in range(n + 1)]
        ahead: list[list[Fetch | Here]] = [[] for _ in range(n + 1)]
        for o in self.offloads:
            if not (0 <= o.send <= o.gone < o.fetch <= o.here < n):
                raise InvalidSchedule(f"an offload of value {o.value} is out of order: {o}; there are {n} runs")
            after[o.send + 1].append(Send(o.value))
        for o in self.offloads:
            after[o.gone + 1].append(Gone(o.value))
        by_need = sorted(self.offloads, key=lambda o: o.here)
        for o in by_need:
            ahead[o.fetch].append(Fetch(o.value))
        for o in by_need:
            ahead[o.here].append(Here(o.value))
        return tuple((tuple(x), tuple(y)) for x, y in zip(after, ahead, strict=True))

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """List the runs, after each what is freed, and what moves."""
        found = list[Action]()
        for i, frees, (after, ahead) in zip(self.order, self.frees, self.moves[: len(self.order)], strict=True):
            found += [*after, *ahead, Run(i), *map(Free, frees)]
        return tuple(found)

    @staticmethod
    def of_actions(actions: Iterable[Action]) -> Schedule:
        """Make a schedule of a list of actions.

        Raises:
            InvalidSchedule: something is freed or sent before anything has run, or an offload is not complete.

        Example:
            >>> schedule = Schedule.of_actions([Run(0), Run(1), Free(2)])
            >>> schedule.order, schedule.frees, len(schedule.actions)
            ((0, 1), ((), (2,)), 3)
        """
        order, frees, moves = list[int](), list[list[int]](), list[tuple[Action, int]]()
        for action in actions:
            if isinstance(action, Run):
                order.append(action.op)
                frees.append([])
            elif isinstance(action, Fetch | Here):
                moves.append((action, len(order)))
            elif not frees:
                what = "freed" if isinstance(action, Free) else "sent"
                raise InvalidSchedule(f"value {action.value} is {what} before anything has run")
            elif isinstance(action, Free):
                frees[-1].append(action.value)
            else:
                moves.append((action, len(order) - 1))
        return Schedule(tuple(order), tuple(map(tuple, frees)), _offloads(moves))

    @cached_property
    def runs_of(self) -> dict[int, int]:
        """How often each op runs."""
        counts: dict[int, int] = {}
        for i in self.order:
            counts[i] = counts.get(i, 0) + 1
        return counts

    def moved_bytes(self, program: Program) -> int:
        """Add up the bytes that go to the slower tier."""
        return sum(program.values[o.value].nbytes for o in self.offloads)

    def extra_seconds(self, program: Program) -> float:
        """Add up the seconds of the reruns alone."""
        return sum((n - 1) * program.ops[i].again_seconds for i, n in self.runs_of.items())


def _offloads(moves: Sequence[tuple[Action, int]]) -> tuple[Offload, ...]:
    """Pair events with their positions into offloads.

    They come in the order in which they are sent.
    """
    places: dict[int, list[int]] = {}
    whole: list[Offload] = []
    for action, position in moves:
        assert not isinstance(action, Run)
        so_far = places.setdefault(action.value, [])
        if not isinstance(action, _EVENTS[len(so_far)]):
            raise InvalidSchedule(f"{action} at run {position} does not follow on the events before it")
        so_far.append(position)
        if len(so_far) == len(_EVENTS):
            whole.append(Offload(action.value, *places.pop(action.value)))
    if places:
        raise InvalidSchedule(f"value {min(places)} is sent to the tier, and never waited for when it comes back")
    return tuple(sorted(whole, key=lambda o: o.send))


_EVENTS: Final = (Send, Gone, Fetch, Here)


def _first_runs(program: Program, order: Sequence[int]) -> dict[int, int]:
    """Find, for every op of the order, its first run."""
    first: dict[int, int] = {}
    for p, i in enumerate(order):
        if not 0 <= i < len(program.ops):
            raise InvalidSchedule(f"run {p} names op {i}, but the program has {len(program.ops)} ops")
        first.setdefault(i, p)
    return first
