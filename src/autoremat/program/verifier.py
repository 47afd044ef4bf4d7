"""``verify``: the judge of schedules, an abstract machine that trusts nobody.

The machine carries out a schedule run by run on a memory of its own, and asks every rule before and after each run.
It shares no code with ``simulate``, with ``Schedule.from_order`` or with any solver, and it uses nothing of the program
but the plain fields of its values and ops. Each rule is one function below, with the sentence it is read as; ``RULES``
lists them. A violation does not stop the machine: it goes on as the schedule claims, so that one call shows all.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Final, NamedTuple

from autoremat.program.model import END, Op, Program
from autoremat.program.plan import Plan
from autoremat.program.schedule import Schedule
from autoremat.program.tier_judge import Tier, disordered

MOST_VIOLATIONS: Final = 20
"""``verify`` stops looking after this many violations: a schedule this broken has one cause, near the first."""

RULES: Final[dict[str, str]] = {}
"""Every rule by name, with the sentence it is read as."""


@dataclass(frozen=True)
class Violation:
    """One broken rule.

    Attributes:
        rule: name of the rule, a key of ``RULES``.
        run: position in ``schedule.order``, -1 when the whole schedule or plan is meant.
        op: the op that runs there, as ``index (name)``; "" when none is concerned.
        value: id of the value concerned, "" when none is.
        message: what happened.
    """

    rule: str
    run: int
    op: str
    value: str
    message: str

    def __str__(self) -> str:
        """Say all of it in one line."""
        where = [f"run {self.run}"] if self.run >= 0 else []
        where += [f"op {self.op}"] if self.op else []
        where += [f"value {self.value!r}"] if self.value else []
        return f"[{self.rule}] {', '.join(where)}{': ' if where else ''}{self.message}"


def verify(program: Program, schedule: Schedule | Plan, *, budget_bytes: int | None = None) -> tuple[Violation, ...]:
    """List every rule that the schedule breaks.

    There is none when it can be carried out and does what it promises.

    Args:
        program: the step that was planned.
        schedule: a schedule, or a plan, whose figures are then checked as well.
        budget_bytes: the most bytes that may be in memory at any time; of a plan its own budget unless given. A bare
            schedule without it is not held to any budget.

    Returns:
        At most ``MOST_VIOLATIONS`` violations, in the order in which they happen. O(runs + reads).

    Example:
        >>> from autoremat.program import Op, Program, Schedule, Value, verify
        >>> values = Value("x", 4, fixed=True), Value("a", 8), Value("y", 4)
        >>> program = Program("tiny", values, (Op("f", (0,), (1,)), Op("g", (1,), (2,))))
        >>> verify(program, Schedule.plain(program))
        ()
        >>> print(*verify(program, Schedule((0, 1), ((1,), (1, 2)))))
        [reads are resident] run 1, op 1 (g), value 'a': the op reads it, but it is not in memory
    """
    if isinstance(schedule, Plan):
        budget = schedule.budget_bytes if budget_bytes is None else budget_bytes
        found = _violations(program, schedule.schedule, budget, schedule)
    else:
        found = _violations(program, schedule, budget_bytes, None)
    return tuple(islice(found, MOST_VIOLATIONS))


def _violations(program: Program, schedule: Schedule, budget: int | None, plan: Plan | None) -> Iterator[Violation]:
    """Carry out the schedule and yield what breaks a rule.

    What is wrong with its runs comes first, then with the whole, then with the plan.
    """
    machine, tier = _Machine(program), Tier(program, schedule)
    for position, (op, frees) in enumerate(zip(schedule.order, schedule.frees, strict=True)):
        run = _Run(position, op, frees)
        _come_back(machine, tier, position)
        for rule, check in _RUN_CHECKS.items():
            for found in check(machine, run):
                yield machine.violation(rule, found, run)
        for rule, moved in _MOVE_CHECKS.items():
            for found in moved(machine, tier, run):
                yield machine.violation(rule, found, run)
        tier.seconds += _seconds(machine, op)
        machine.carry_out(run)
        _go(machine, tier, position)
    promises = _Promises(budget, plan, tier)
    for rule, whole in _WHOLE_CHECKS.items():
        for found in whole(machine, promises):
            yield machine.violation(rule, found)


# --- The machine ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """One step of a schedule, right or wrong.

    The op may not exist, and anything may stand in its frees.
    """

    position: int
    op: int
    frees: tuple[int, ...]


@dataclass(frozen=True)
class _Promises:
    """What the schedule is held to beyond being possible."""

    budget_bytes: int | None
    plan: Plan | None
    tier: Tier


class _Found(NamedTuple):
    """What a check found.

    The machine adds the rule and, where it is about one run, the run.
    """

    message: str
    value: int | None = None
    op: int = -1
    run: int = -1


@dataclass
class _Machine:
    """Memory and clock of the abstract machine.

    Attributes:
        program: the step that is carried out.
        memory: for every value in memory the bytes of its storage.
        in_use: bytes of all storages together.
        high: for every run the most bytes that were in use while it ran, scratch included.
        op_at: for every run the op that ran.
        first_run: for every op that has run the position of its first run.
        latest: the largest index of an op that has run, -1 before the first.
        extra: seconds of every rerun.
        block: the ops that have run again one after the other, all of one call, up to now; empty after a first run.
        block_made: of the values that the block has written, whether another copy was in memory before.
        twice: bytes of those other copies, which leave when the block ends.
        stuck: values in memory that only the block which made them could read.
        handed: for every value that an ``unpack`` has handed to the backward the latest of these ops.
        hasty: values that the block uses and that were freed although the call still held them at that op in its first
            run, each with the run after which it was freed.
    """

    program: Program
    memory: dict[int, int] = field(default_factory=dict)
    in_use: int = 0
    high: list[int] = field(default_factory=list)
    op_at: list[int] = field(default_factory=list)
    first_run: dict[int, int] = field(default_factory=dict)
    latest: int = -1
    extra: list[float] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    block_made: dict[int, bool] = field(default_factory=dict)
    twice: int = 0
    stuck: set[int] = field(default_factory=set)
    handed: dict[int, int] = field(default_factory=dict)
    hasty: list[tuple[int, int]] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for v, value in enumerate(self.program.values):
            if value.fixed:
                self._allocate(v)

    def carry_out(self, run: _Run) -> None:
        """Run the op and free what the schedule frees, unquestioned."""
        op = self.op(run.op)
        self.op_at.append(run.op)
        if not self.goes_on(run.op):
            self._end_block()
        taken = self._execute(op, run.frees, again=run.op in self.first_run) if op else set()
        if op is None:
            self.high.append(self.in_use)
        elif run.op in self.first_run:
            self.extra.append(op.again_seconds)
            self.block.append(run.op)
            self.hasty += [(v, run.position) for v in run.frees if self._is_hasty(v, run.op)]
        else:
            self.first_run[run.op] = run.position
            self.latest = max(self.latest, run.op)
            self.handed.update((v, run.op) for v in op.reads if op.kind == "ask")
        self.left |= {v: run.position for v in run.frees if v not in self.left}
        for v in set(run.frees) - taken:
            if v in self.memory and not self.program.values[v].fixed:
                self.in_use -= self.memory.pop(v)

    def goes_on(self, op: int) -> bool:
        """Tell whether a run of the op continues the call's block."""
        if not self.block or op != self.block[-1] + 1 or op not in self.first_run:
            return False
        return self.program.ops[op].call == self.program.ops[op - 1].call >= 0

    def _end_block(self) -> None:
        """Merge copies made twice; drop what cannot be handed out."""
        for v, before in self.block_made.items():
            if not self.handed_out(v) and not before:
                self.stuck.add(v)
        self.in_use -= self.twice
        self.twice, self.block, self.block_made, self.hasty = 0, [], {}, []

    def handed_out(self, v: int) -> bool:
        """Tell whether the block has reached where it hands out the value."""
        available = self.program.values[v].available
        return available is None or (available >= 0 and available <= self.block[-1])

    def _is_hasty(self, v: int, op: int) -> bool:
        """Tell whether the block loses a value that its call still held."""
        held = self.held_until(v) if 0 <= v < len(self.program.values) else None
        used = any(v in (*self.program.ops[i].reads, *self.program.ops[i].writes) for i in self.block)
        return used and held is not None and held > op

    def used_until(self, v: int, asked: int) -> int:
        """Find the last op that uses what was handed at ``asked``.

        It is -1 for none. A node of the backward may ask for the same value several times before its own ops run.
        """
        ops = self.program.ops
        if asked < 0:
            return -1
        until, together = asked, asked
        while together + 1 < len(ops) and ops[together + 1].kind == "ask":
            together += 1
        for i in self._readers[v][bisect_right(self._readers[v], asked) :]:
            if ops[i].kind != "ask":
                until = i
            elif i > together:
                break
        return until

    @cached_property
    def _readers(self) -> list[list[int]]:
        """For every value the ops that read it, in order."""
        found: list[list[int]] = [[] for _ in self.program.values]
        for i, op in enumerate(self.program.ops):
            for v in op.reads:
                found[v].append(i)
        return found

    def _execute(self, op: Op, frees: tuple[int, ...], *, again: bool) -> set[int]:
        """Run the kernel with its storages and scratch; return values taken over."""
        for v in op.reads:
            if v not in self.memory:  # `reads are resident` has said so; go on as if it were there
                self._allocate(v)
        if again:
            self.block_made.update((v, v in self.memory and v not in self.stuck) for v in op.writes)
        self.stuck.difference_update(op.writes)
        self.twice += sum(self.memory.pop(v, 0) for v in op.writes)
        taken = {new: old for new, old in op.in_place if old in frees and not self.program.values[old].fixed}
        shrunk = 0
        for v in op.writes:
            self._allocate(v)
            if v in taken:
                storage = self.memory.pop(taken[v])
                self.in_use -= storage
                shrunk += max(0, storage - self.memory[v])
        self.high.append(self.in_use + shrunk + (op.again_scratch_bytes if again else op.scratch_bytes))
        return set(taken.values())

    def _allocate(self, v: int) -> None:
        self.memory[v] = self.program.values[v].nbytes
        self.in_use += self.memory[v]

    def peak(self) -> int:
        """Return the most bytes that were ever in use."""
        return max(self.high, default=self.in_use)

    def known_runs(self) -> list[tuple[int, int]]:
        """List position and op of the runs whose op exists."""
        return [(position, i) for position, i in enumerate(self.op_at) if self.op(i)]

    def op(self, i: int) -> Op | None:
        """Look up the op, if the program has one of that index."""
        return self.program.ops[i] if 0 <= i < len(self.program.ops) else None

    def held_until(self, v: int) -> int | None:
        """Return the last op that the value is held for, ``END`` resolved."""
        held = self.program.values[v].held
        return len(self.program.ops) - 1 if held == END else held

    def violation(self, rule: str, found: _Found, run: _Run | None = None) -> Violation:
        """Put names on what was found: of the op and the value."""
        position, i = (run.position, run.op) if run else (found.run, found.op)
        op, values = self.op(i), self.program.values
        value = "" if found.value is None else f"number {found.value}"
        if found.value is not None and 0 <= found.value < len(values):
            value = values[found.value].id
        return Violation(rule, position, f"{i} ({op.name})" if op else "", value, found.message)


def _come_back(machine: _Machine, tier: Tier, run: int) -> None:
    """Begin the copies back ahead of a run, then wait.

    The wait is for the copies back that are to end ahead of the run.
    """
    for o in tier.at("fetch", run):
        if o.value not in machine.memory and 0 <= o.value < len(machine.program.values):
            machine._allocate(o.value)
            tier.fetch(o.value)
    for o in tier.at("here", run):
        if o.value in tier.coming:
            tier.here(o.value)


def _go(machine: _Machine, tier: Tier, run: int) -> None:
    """Begin the copies out that follow a run, then wait.

    The wait is for the copies out that are to end after the run; what is gone leaves memory.
    """
    for o in tier.at("send", run):
        if o.value in machine.memory:
            tier.send(o.value)
    for o in tier.at("gone", run):
        if o.value in tier.leaving:
            tier.gone(o.value)
            if o.value in machine.memory and not machine.program.values[o.value].fixed:
                machine.in_use -= machine.memory.pop(o.value)
                machine.left.setdefault(o.value, run)


def _seconds(machine: _Machine, i: int) -> float:
    op = machine.op(i)
    return 0.0 if op is None else op.again_seconds if i in machine.first_run else op.seconds


# --- The rules --------------------------------------------------------------------------------------------------------

_RunCheck = Callable[[_Machine, _Run], Iterator[_Found]]
_WholeCheck = Callable[[_Machine, _Promises], Iterator[_Found]]
_MoveCheck = Callable[[_Machine, Tier, _Run], Iterator[_Found]]
_RUN_CHECKS: dict[str, _RunCheck] = {}
_MOVE_CHECKS: dict[str, _MoveCheck] = {}
_WHOLE_CHECKS: dict[str, _WholeCheck] = {}


def _of_each_run(rule: str, reads_as: str) -> Callable[[_RunCheck], _RunCheck]:
    """Register the function as the check before each run.

    ``reads_as``: "is read as: ...".
    """

    def register(check: _RunCheck) -> _RunCheck:
        RULES[rule] = f"is read as: {reads_as}"
        _RUN_CHECKS[rule] = check
        return check

    return register


def _of_the_whole(rule: str, reads_as: str) -> Callable[[_WholeCheck], _WholeCheck]:
    """Register the function as the check after all runs."""

    def register(check: _WholeCheck) -> _WholeCheck:
        RULES[rule] = f"is read as: {reads_as}"
        _WHOLE_CHECKS[rule] = check
        return check

    return register


def _of_moves(rule: str, reads_as: str) -> Callable[[_MoveCheck], _MoveCheck]:
    """Make the function a check of what moves around each run.

    Of a rule that there is already, it is one more.
    """

    def register(check: _MoveCheck) -> _MoveCheck:
        RULES[rule] = f"is read as: {reads_as}"
        _MOVE_CHECKS[rule] = check
        return check

    return register


@_of_each_run("ops exist", "every run is of an op of the program")
def _ops_exist(machine: _Machine, run: _Run) -> Iterator[_Found]:
    if machine.op(run.op) is None:
        yield _Found(f"there is no op {run.op}; the program has {len(machine.program.ops)} ops")


@_of_each_run("order kept", "the first runs of the ops are in program order")
def _order_kept(machine: _Machine, run: _Run) -> Iterator[_Found]:
    if machine.op(run.op) and run.op not in machine.first_run and run.op < machine.latest:
        later = machine.program.ops[machine.latest].name
        yield _Found(f"the op runs for the first time, but op {machine.latest} ({later}) already has")


@_of_each_run("repeatable", "only an op that may run again runs a second time")
def _repeatable(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    if op and op.once and run.op in machine.first_run:
        yield _Found(f"the op must not run again ({op.why}), but it ran in run {machine.first_run[run.op]}")


@_of_the_whole("runs allowed", "no op runs more often than the engine that recorded the program can run it")
def _runs_allowed(machine: _Machine, _: _Promises) -> Iterator[_Found]:
    most = machine.program.abilities.most_runs
    for i in range(len(machine.program.ops)) if most is not None else ():
        n = machine.op_at.count(i)
        if most is not None and n > most:
            yield _Found(f"the op runs {n} times; the engine can run it {most} times", op=i)


@_of_the_whole("reruns at asks", "where the engine says so, further runs stand ahead of what the backward asks for")
def _reruns_at_asks(machine: _Machine, _: _Promises) -> Iterator[_Found]:
    ops, seen, waiting = machine.program.ops, set[int](), -1
    for p, i in machine.known_runs() if machine.program.abilities.reruns == "at asks" else ():
        if i in seen:
            waiting = p
        elif waiting >= 0:
            if ops[i].kind != "ask":
                what = f"op {i} ({ops[i].name}) runs next, which asks for nothing"
                yield _Found(f"it is a further run, and {what}", op=machine.op_at[waiting], run=waiting)
            waiting = -1
        seen.add(i)


@_of_the_whole("reruns by decisions", "where the engine says so, a value is kept for the backward or made again in it")
def _reruns_by_decisions(machine: _Machine, _: _Promises) -> Iterator[_Found]:
    ops, runs = machine.program.ops, machine.known_runs()
    if machine.program.abilities.reruns != "by decisions":
        return
    begin = next((p for p, i in runs if ops[i].phase == "backward"), len(machine.op_at))
    for p, i in reversed([run for run in runs if run[0] < begin]):
        if machine.first_run[i] == p:
            break
        begin = p  # it runs again right ahead of the backward
    times = {i: 0 for _, i in runs}
    for p, i in runs:
        times[i] += 1
        if times[i] > 1 and p < begin:
            yield _Found("it runs again in the forward", op=i, run=p)
        elif times[i] > 2:
            yield _Found("it runs more than twice", op=i, run=p)
        elif times[i] == 2:
            for v in ops[i].writes:
                if machine.left.get(v, len(machine.op_at)) >= begin:
                    yield _Found("it has been kept into the backward, and is made again", v, op=i, run=p)


@_of_each_run(
    "calls run from the beginning",
    "a further run of an op of a call follows directly on a further run of the op before it in that call; "
    "only the first op of a call begins",
)
def _calls_run_from_the_beginning(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op, before = machine.op(run.op), machine.op(run.op - 1)
    inside = op is not None and before is not None and op.call == before.call >= 0
    if before and inside and run.op in machine.first_run and not machine.goes_on(run.op):
        yield _Found(f"the op runs again without op {run.op - 1} ({before.name}) of the same call right before it")


@_of_each_run(
    "calls hand out what is ready",
    "what a further run of a call has made is read by later ops only if the call had come to the op after which it can "
    "hand the value out",
)
def _calls_hand_out_what_is_ready(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    ended = not machine.goes_on(run.op)
    for v in op.reads if op else ():
        not_ready = ended and v in machine.block_made and not machine.block_made[v] and not machine.handed_out(v)
        if v in machine.memory and (v in machine.stuck or not_ready):
            yield _Found("the op reads it, but the call that made it again had not come to where it can hand it out", v)


@_of_each_run(
    "calls hold what they held",
    "while a call runs again, a value that it uses leaves no earlier than in the first run",
)
def _calls_hold_what_they_held(machine: _Machine, run: _Run) -> Iterator[_Found]:
    for v, position in machine.hasty if machine.goes_on(run.op) else ():
        yield _Found(f"it is freed after run {position}, but the call goes on and held it in its first run", v)


@_of_each_run("reads are resident", "while an op runs, every value that it reads is in memory")
def _reads_are_resident(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    for v in op.reads if op else ():
        if v not in machine.memory:
            yield _Found("the op reads it, but it is not in memory", v)


@_of_each_run(
    "storage taken over",
    "the first run of an in-place op overwrites the value that it reads, so that value leaves with that run; "
    "a further run may work on a copy instead",
)
def _storage_taken_over(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    if op is None or run.op in machine.first_run:
        return
    for new, old in op.in_place:
        if old not in run.frees:
            by = machine.program.values[new].id
            yield _Found(f"its storage is taken over by {by!r} in this run, but it is not among the frees", old)


@_of_each_run("frees are of resident values", "what is freed after a run is in memory then, and is freed once")
def _frees_are_of_resident_values(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    there = set(op.reads + op.writes) if op else set()
    freed: set[int] = set()
    for v in run.frees:
        if v in freed:
            yield _Found("it is freed twice after the same run", v)
        elif v not in machine.memory and v not in there:
            yield _Found("it is freed, but it is not in memory", v)
        freed.add(v)


@_of_each_run("fixed values stay", "a fixed value is in memory from the beginning to the end")
def _fixed_values_stay(machine: _Machine, run: _Run) -> Iterator[_Found]:
    values = machine.program.values
    for v in run.frees:
        if 0 <= v < len(values) and values[v].fixed:
            yield _Found("it is fixed, but it is freed", v)


@_of_each_run("held values stay", "a value is not freed before the op until which it is held has run")
def _held_values_stay(machine: _Machine, run: _Run) -> Iterator[_Found]:
    for v in run.frees:
        held = machine.held_until(v) if 0 <= v < len(machine.program.values) else None
        if held is not None and held != run.op and held not in machine.first_run:
            name = machine.program.ops[held].name
            yield _Found(f"it is held until op {held} ({name}) has run, but it is freed before", v)


@_of_each_run(
    "handed values stay",
    "what an unpack has handed to the backward is not freed before the ops that read it as it was handed have run",
)
def _handed_values_stay(machine: _Machine, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    asks = op.reads if op and op.kind == "ask" else ()
    for v in run.frees:
        until = machine.used_until(v, run.op if v in asks else machine.handed.get(v, -1))
        if until not in (-1, run.op) and until not in machine.first_run:
            by = f"op {until} ({machine.program.ops[until].name})"
            yield _Found(f"{by} still reads what the backward has been handed, but it is freed before", v)


@_of_moves("sent whole", "what is sent is in memory then, as a whole, is not fixed, and is not on its way already")
def _sent_whole(machine: _Machine, tier: Tier, run: _Run) -> Iterator[_Found]:
    op, values = machine.op(run.op), machine.program.values
    made = set(op.writes) if op else set()
    for v in (o.value for o in tier.at("send", run.position)):
        if not 0 <= v < len(values):
            yield _Found("it is sent, but the program has no such value", v)
        elif values[v].fixed:
            yield _Found("it is sent, but it is fixed, and never leaves", v)
        elif v in tier.leaving or v in tier.coming:
            yield _Found("it is sent while another copy of it has not ended", v)
        elif (v not in machine.memory and v not in made) or v in run.frees or v in machine.stuck:
            yield _Found("it is sent, but it is not in memory", v)


@_of_moves(
    "sources stay", "while a value is copied to the tier, it is neither freed, nor overwritten, nor made once more"
)
def _sources_stay(machine: _Machine, tier: Tier, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    changed = {*op.writes, *(old for _, old in op.in_place)} if op else set[int]()
    for v in tier.leaving:
        if v in run.frees:
            yield _Found("it is freed, but the copy to the tier still reads it", v)
        elif v in changed:
            yield _Found("it is overwritten, but the copy to the tier still reads it", v)
    for v in (o.value for o in tier.at("send", run.position)):
        if op and v in {old for _, old in op.in_place}:
            yield _Found("it is sent after its storage has been taken over", v)


@_of_moves("gone when nobody needs it", "what goes is held by nobody, and is not what the backward uses at that moment")
def _gone_when_nobody_needs_it(machine: _Machine, tier: Tier, run: _Run) -> Iterator[_Found]:
    leaving = tuple(o.value for o in tier.at("gone", run.position))
    for check in (_held_values_stay, _handed_values_stay):
        for found in check(machine, _Run(run.position, run.op, leaving)):
            yield _Found(found.message.replace("is freed before", "is gone before"), found.value)


@_of_moves("away until fetched", "what is in the tier is not made once more, and is not freed")
def _away_until_fetched(machine: _Machine, tier: Tier, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    for v in tier.away:
        if op and v in op.writes:
            yield _Found("it is made again while it is in the tier: then there would be two of it", v)


@_of_moves("read once it is here", "what comes back is neither read, nor freed, nor written before it is here")
def _read_once_it_is_here(machine: _Machine, tier: Tier, run: _Run) -> Iterator[_Found]:
    op = machine.op(run.op)
    for v in tier.coming:
        if op and v in (*op.reads, *op.writes):
            yield _Found("the op uses it, but the copy back has not been waited for", v)
        elif v in run.frees:
            yield _Found("it is freed, but the copy back still writes it", v)


@_of_moves(
    "moves between calls", "where ops belong to calls, or reruns stand at asks, values move at the begin of those"
)
def _moves_between_calls(machine: _Machine, tier: Tier, run: _Run) -> Iterator[_Found]:
    ops, p, op = machine.program.ops, run.position, machine.op(run.op)
    moving = [o.value for event in ("send", "gone") for o in tier.at(event, p - 1)]
    moving += [o.value for event in ("fetch", "here") for o in tier.at(event, p)]
    if op is None or not moving:
        return
    by_calls = any(op.call >= 0 for op in ops)
    if machine.program.abilities.reruns != "at asks" and not by_calls:
        return
    before = machine.op(machine.op_at[-1]) if machine.op_at else None
    if run.op in machine.first_run or op.kind == "ask":
        begins = not machine.block
    elif by_calls:
        begins = op.call >= 0 and (before is None or before.call != op.call)
    else:
        begins = op.phase == "forward"
    for v in moving if not begins else ():
        where = f"op {run.op} ({ops[run.op].name})"
        yield _Found(f"it moves right ahead of {where}, in the middle of what the engine runs as one", v)


@_of_the_whole("offloads in order", "a value is sent, then gone, then fetched, then here, at runs of the schedule")
def _offloads_in_order(machine: _Machine, promises: _Promises) -> Iterator[_Found]:
    schedule = promises.tier.schedule
    for o in schedule.offloads:
        if disordered(o, len(schedule.order)):
            events = f"send {o.send}, gone {o.gone}, fetch {o.fetch}, here {o.here}"
            yield _Found(f"its events are not in order ({events}; there are {len(schedule.order)} runs)", o.value)
    for v in sorted({*promises.tier.leaving, *promises.tier.away, *promises.tier.coming}):
        yield _Found("it is still in the tier, or on its way, at the end", v)


@_of_the_whole("a link to the tier", "values are offloaded where the program has a link and its engine can do it")
def _a_link_to_the_tier(machine: _Machine, promises: _Promises) -> Iterator[_Found]:
    if not promises.tier.schedule.offloads:
        return
    if machine.program.link is None:
        yield _Found(f"{len(promises.tier.schedule.offloads)} values are offloaded, but the program has no link")
    if machine.program.abilities.reruns == "by decisions":
        yield _Found("values are offloaded, but the engine can keep a value or make it again, and no more")


@_of_the_whole("tier kept", "the bytes in the tier are within what the link says that it takes")
def _tier_kept(machine: _Machine, promises: _Promises) -> Iterator[_Found]:
    link, high = machine.program.link, promises.tier.high
    if link is not None and link.tier_bytes is not None and high > link.tier_bytes:
        yield _Found(f"{high} bytes are in the tier, {high - link.tier_bytes} more than it takes")


@_of_the_whole("every op runs", "every op of the program runs at least once")
def _every_op_runs(machine: _Machine, _: _Promises) -> Iterator[_Found]:
    for i in range(len(machine.program.ops)):
        if i not in machine.first_run:
            yield _Found("the op never runs", op=i)


@_of_the_whole("nothing left", "at the end only fixed values and those held to the end are in memory")
def _nothing_left(machine: _Machine, _: _Promises) -> Iterator[_Found]:
    last = len(machine.program.ops) - 1
    for v in sorted(machine.memory):
        if not machine.program.values[v].fixed and machine.held_until(v) != last:
            yield _Found("it is never freed, though nothing holds it to the end", v)


@_of_the_whole("budget kept", "while any op runs, the bytes in memory and its scratch are within the budget")
def _budget_kept(machine: _Machine, promises: _Promises) -> Iterator[_Found]:
    budget, peak = promises.budget_bytes, machine.peak()
    if budget is None or peak <= budget:
        return
    above = sum(high > budget for high in machine.high)
    run = machine.high.index(peak) if machine.high else -1
    message = f"{peak} bytes are in memory, {peak - budget} over the budget of {budget} bytes; runs over it: {above}"
    yield _Found(message, op=machine.op_at[run] if machine.op_at else -1, run=run)


@_of_the_whole("plan's program", "a plan is judged against the program that it was made for")
def _plans_program(machine: _Machine, promises: _Promises) -> Iterator[_Found]:
    if promises.plan and promises.plan.program != machine.program:
        yield _Found(f"the plan is for program {promises.plan.program.name!r}, which is not the one given")


@_of_the_whole("plan's figures", "what a plan says of peaks, overhead and bounds is what the machine counted")
def _plans_figures(machine: _Machine, promises: _Promises) -> Iterator[_Found]:
    plan = promises.plan
    if plan is None:
        return
    overhead, plain_peak = _overhead(machine, promises.tier, plan.plain_seconds), _plain_peak(machine.program)
    if plan.peak_bytes != machine.peak():
        yield _Found(f"peak_bytes is {plan.peak_bytes}, but the machine counted {machine.peak()}")
    if plan.plain_peak_bytes < plain_peak or (not plan.plain_seconds and plan.plain_peak_bytes > plain_peak):
        yield _Found(f"plain_peak_bytes is {plan.plain_peak_bytes}, but the machine counted {plain_peak}")
    if not abs(plan.overhead - overhead) <= _FRACTION_SLACK:
        yield _Found(f"overhead is {plan.overhead}, but the machine counted {overhead}")
    if not plan.lower_bound <= overhead + _FRACTION_SLACK:
        yield _Found(f"lower_bound is {plan.lower_bound}, but this very schedule has an overhead of {overhead}")
    if plan.floor_bytes > max(plan.budget_bytes, machine.peak()):
        yield _Found(f"floor_bytes is {plan.floor_bytes}, but this plan is for {plan.budget_bytes} bytes")
    if (least := plan.floor_lower_bound_bytes) > machine.peak():
        yield _Found(f"floor_lower_bound_bytes is {least}, but this very schedule has a peak of {machine.peak()} bytes")


_FRACTION_SLACK: Final = 1e-6
"""Sums of seconds depend on their order in the last digits; fractions closer than this are the same."""


def _overhead(machine: _Machine, tier: Tier, plain_seconds: float) -> float:
    """Divide the seconds of reruns and of waiting by the plain program's.

    It is 0 where nothing takes any time. Where plain training is another program, what this one takes more is extra.
    """
    once = math.fsum(op.seconds for op in machine.program.ops)
    extra = math.fsum(machine.extra) + tier.waited
    if plain_seconds:
        return max(0.0, once + extra - plain_seconds) / plain_seconds
    return extra / once if once else 0.0


def _plain_peak(program: Program) -> int:
    """Run the program as it is and return its peak.

    On a fresh machine, each value leaves after its last reader or its hold.
    """
    machine = _Machine(program)
    last = {v: i for i, op in enumerate(program.ops) for v in (*op.writes, *op.reads)}
    leaving: dict[int, list[int]] = {}
    for v, i in last.items():
        if not program.values[v].fixed:
            leaving.setdefault(max(i, machine.held_until(v) or 0), []).append(v)
    for i in range(len(program.ops)):
        machine.carry_out(_Run(i, i, tuple(leaving.get(i, ()))))
    return machine.peak()
