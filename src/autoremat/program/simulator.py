"""``simulate``: the byte-exact account of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

from autoremat.program.errors import InvalidSchedule
from autoremat.program.link import Clocks
from autoremat.program.model import Op, Program
from autoremat.program.plan import Plan
from autoremat.program.schedule import Fetch, Gone, Here, Schedule, Send


@dataclass(frozen=True)
class Timeline:
    """Bytes and seconds of a schedule, run by run.

    Attributes:
        resident_bytes: for every run, the bytes in memory while it runs (reads, writes, scratch and all that stays).
        peak_bytes: the largest of them.
        peak_run: the run at which the peak stands (the first one).
        peak_op: index of the op of that run.
        resident_at_peak: indices of the values in memory at the peak, largest first; of a storage that is being taken
            over only the value that is written.
        seconds: duration of all runs.
        extra_seconds: duration of the reruns alone.
        repeats: ``(op, reruns)`` of every op that runs more than once.
        waited_seconds: in which no op runs, because a copy to or from the tier has not ended; part of ``seconds``.
        tier_bytes: the most bytes in the tier at a time; a value is there from ``send`` to ``here``.
        sent_bytes: bytes that go to the tier in all; as many come back.
    """

    resident_bytes: tuple[int, ...]
    peak_bytes: int
    peak_run: int
    peak_op: int
    resident_at_peak: tuple[int, ...]
    seconds: float
    extra_seconds: float
    repeats: tuple[tuple[int, int], ...]
    waited_seconds: float = 0.0
    tier_bytes: int = 0
    sent_bytes: int = 0

    @property
    def overhead_seconds(self) -> float:
        """Seconds beyond the plain program: reruns, and waiting.

        The step takes so much longer; it waits for copies.
        """
        return self.extra_seconds + self.waited_seconds


def simulate(program: Program, plan: Plan | Schedule | None = None) -> Timeline:
    """Account for every byte of a plan or schedule, run by run.

    Where none is given, the account is that of the plain program.

    Bytes while an op runs: everything resident before it, plus what it writes (an in-place op whose input leaves with
    this run takes over its storage instead; only what it grows by is added), plus its scratch. A value that is written
    while it is still resident is there twice during that run, or until the end of the block where a call runs again.
    A value in the tier takes no memory from its ``gone`` to its ``fetch``. O(runs + reads).

    Raises:
        InvalidSchedule: a run names an op that does not exist, an op reads a value that is not resident, or a value
            that is not resident is freed or sent; something is offloaded, and the program has no link.

    Example:
        >>> from autoremat.program import Op, Program, Value, simulate
        >>> values = Value("x", 4, fixed=True), Value("a", 8), Value("y", 4)
        >>> simulate(Program("tiny", values, (Op("f", (0,), (1,)), Op("g", (1,), (2,))))).peak_bytes
        16
    """
    schedule = plan.schedule if isinstance(plan, Plan) else plan or Schedule.plain(program)
    resident = {v for v, value in enumerate(program.values) if value.fixed}
    nbytes = [v.nbytes for v in program.values]
    current, twice = program.fixed_bytes, 0
    during: list[int] = []
    seen: set[int] = set()
    tier = _Tier(program, schedule) if schedule.offloads else None
    for p, (i, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        op = _op(program, p, i)
        if not (i in seen and program.call_begin[i] < i and schedule.order[p - 1] == i - 1):
            current, twice = current - twice, 0
        if tier:
            current += tier.move(p, resident)
            tier.clocks.run(op.again_seconds if i in seen else op.seconds)
        _require_resident(program, resident, op.reads, f"run {p}: op {i} ({op.name}) reads")
        grown = sum(nbytes[v] for v in op.writes)
        for new, old in _taken_over(op, frees):
            grown -= min(nbytes[new], nbytes[old])
        during.append(current + grown + (op.again_scratch_bytes if i in seen else op.scratch_bytes))
        seen.add(i)
        current += sum(nbytes[v] for v in op.writes)
        twice += sum(nbytes[v] for v in op.writes if v in resident)
        resident.update(op.writes)
        for v in frees:
            _require_resident(program, resident, (v,), f"run {p}: op {i} ({op.name}) is followed by a free of")
            resident.remove(v)
            current -= nbytes[v]
    peak_run = max(range(len(during)), key=during.__getitem__, default=-1)
    at_peak = _resident_at(program, schedule, peak_run)
    extra = schedule.extra_seconds(program)
    waited = tier.clocks.waited_seconds if tier else 0.0
    return Timeline(
        resident_bytes=tuple(during),
        peak_bytes=during[peak_run] if during else current,
        peak_run=peak_run,
        peak_op=schedule.order[peak_run] if during else -1,
        resident_at_peak=tuple(sorted(at_peak, key=lambda v: (-nbytes[v], v))),
        seconds=program.seconds + extra + waited,
        extra_seconds=extra,
        repeats=tuple((i, n - 1) for i, n in sorted(schedule.runs_of.items()) if n > 1),
        waited_seconds=waited,
        tier_bytes=tier.most_bytes if tier else 0,
        sent_bytes=schedule.moved_bytes(program),
    )


class _Tier:
    """The tier of a schedule, and the clocks of ops and link."""

    def __init__(self, program: Program, schedule: Schedule) -> None:
        if program.link is None:
            raise InvalidSchedule(f"the schedule offloads values, but program {program.name!r} has no link to a tier")
        self.clocks, self.most_bytes = Clocks(program.link), 0
        self._program, self._schedule = program, schedule
        self._bytes = 0
        self._coming: set[int] = set()

    def move(self, p: int, resident: set[int]) -> int:
        """Move values between run ``p`` and the run before.

        Returns by how many bytes memory grows.
        """
        grown, values, clocks = 0, self._program.values, self.clocks
        for event in (*self._schedule.moves[p][0], *self._schedule.moves[p][1]):
            v = event.value
            if isinstance(event, Send | Gone):
                _require_resident(self._program, resident, (v,), f"before run {p}: {event} is of")
            match event:
                case Send():
                    clocks.begin("out", v, values[v].nbytes)
                    self._bytes += values[v].nbytes
                case Gone():
                    clocks.wait("out", v)
                    resident.remove(v)
                    grown -= values[v].nbytes
                case Fetch():
                    clocks.begin("in", v, values[v].nbytes)
                    self._coming.add(v)
                    grown += values[v].nbytes
                case Here():
                    clocks.wait("in", v)
                    self._coming.remove(v)
                    resident.add(v)
                    self._bytes -= values[v].nbytes
            self.most_bytes = max(self.most_bytes, self._bytes)
        return grown


def _op(program: Program, run: int, i: int) -> Op:
    if not 0 <= i < len(program.ops):
        raise InvalidSchedule(f"run {run} names op {i}, but the program has {len(program.ops)} ops")
    return program.ops[i]


def _require_resident(program: Program, resident: set[int], values: tuple[int, ...], what: str) -> None:
    for v in values:
        if v not in resident:
            known = repr(program.label(v)) if 0 <= v < len(program.values) else f"value number {v}"
            raise InvalidSchedule(f"{what} {known}, which is not resident; verify() lists all mistakes")


def _taken_over(op: Op, frees: tuple[int, ...]) -> list[tuple[int, int]]:
    """Select the in-place pairs whose storage the run takes over.

    There the read value leaves with the run.
    """
    return [(new, old) for new, old in op.in_place if old in frees]


def _resident_at(program: Program, schedule: Schedule, run: int) -> set[int]:
    """Collect the values in memory while the given run happens."""
    resident = {v for v, value in enumerate(program.values) if value.fixed}
    if run < 0:
        return resident
    for i, frees, moves in zip(schedule.order[:run], schedule.frees[:run], schedule.moves[1 : run + 1], strict=True):
        resident.update(program.ops[i].writes)
        resident.difference_update(frees)
        resident.difference_update(event.value for event in moves[0] if isinstance(event, Gone))
        resident.update(event.value for event in moves[1] if isinstance(event, Fetch))
    op = program.ops[schedule.order[run]]
    return resident.union(op.writes).difference(old for _, old in _taken_over(op, schedule.frees[run]))
