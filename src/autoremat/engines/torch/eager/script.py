"""From a plan to what the tape does: a script of what to prepare, keep and drop, and of what to make again when.

Pure data but for the functions that are called.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Final

from autoremat.engines.torch.eager.composite import Composite, untouched
from autoremat.engines.torch.eager.path import Call, Path
from autoremat.engines.torch.eager.several import held_bytes, waiting_bytes
from autoremat.program import Plan, Program, Timeline, simulate
from autoremat.program.lifetimes import Lifetimes

_SPARE_SECONDS: Final = 5e-5
"""About what it takes to be ready to make one call again that the plan does not."""


@dataclass(frozen=True, slots=True)
class Rerun:
    """Make a call again, then let go of some values.

    Attributes:
        call: which.
        install: values that it makes and that stay for a while.
        drops: values to let go of afterwards.
    """

    call: int
    install: frozenset[int]
    drops: frozenset[int]


@dataclass(frozen=True, slots=True)
class Act:
    """What to do when the backward asks for what a pack stands for: first the reruns, then the answer, then the drop.

    Attributes:
        pack: number of the pack.
        value: that it stands for.
        reruns: calls to make again before.
        drop: whether the value leaves afterwards.
    """

    pack: int
    value: int
    reruns: tuple[Rerun, ...]
    drop: bool


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do at a call that the plan has something to do with.

    Attributes:
        call: of the path.
        ready: be ready to make it again.
        hold: values that it makes and the tape itself holds on to.
        stops: values after which a run of it may end, once they have been saved inside it.
        hooked: something is to be done about what autograd saves in it.
    """

    call: Call
    ready: bool
    hold: frozenset[int]
    stops: frozenset[int]
    hooked: bool = True
    values: dict[int, int] = field(default_factory=dict)
    """What it reads: by position among the tensors given, the value."""
    written: frozenset[int] = frozenset()
    """Positions of what it overwrites."""
    spare: bool = False
    """Be ready to make it again should the path be left, though the plan does not."""


@dataclass(frozen=True)
class Script:
    """What the tape follows.

    Attributes:
        funcs: what is called, in order.
        works: for every call what there is to do, if anything.
        packs: for everything that autograd saves: None to keep it as it is, or the value whose memory may go.
        asked: packs that are kept, and at which something is to be done when they are asked for.
        acts: what to do at requests of the backward, in order.
        kept: values of packs that are kept.
        hold: values that the tape itself holds on to.
        hold_at: of those the ones made and saved inside a call, by the number of a pack that is kept.
        twice: calls for whose second run, right after the first, the budget has room.
        budget_bytes: the budget; None: a step off the path may take what it likes.
        beside_bytes: what anything but the values that the tape holds takes at most: in the forward, then from each
            request of the backward to the next.
        gradient_bytes: of that at least so much, each time, are gradients of parameters: these grow with no input.
        fixed_bytes: what is always there.
        watch: the forward is known to write memory in ways that torch does not see.
        where: for every call its operator, module and line, for messages.
        loose: something is to be done about what autograd saves outside of all calls, for a custom function.
        numels: for every call the elements of the tensor that it gives; for a larger one there is no plan.
        saved_bytes: what autograd itself keeps, after so many calls.
        held_bytes: what there is between forward and backward, beside what is always there; in plain training.
        waiting_bytes: what there is beside that, while the backward goes through another call.
        last: number of the pack that is asked for last.
        spare_works: in place of ``works``, where the path may be left: whatever may be made again is prepared.
        spare_share: what that takes, as a share of the time of plain training: an estimate.
        packed: for everything that autograd saves the value, if it has one.
        costs: for every call the seconds of another run, and the bytes of what it makes and takes beside.
        composites: by their first call, functions made of others at whose calls there is nothing to do.
    """

    funcs: tuple[Callable[..., Any], ...]
    works: tuple[Work | None, ...]
    packs: tuple[int | None, ...]
    asked: frozenset[int]
    acts: tuple[Act, ...]
    hold: frozenset[int]
    kept: frozenset[int] = frozenset()
    hold_at: dict[int, int] = field(default_factory=dict)
    twice: frozenset[int] = frozenset()
    budget_bytes: int | None = None
    beside_bytes: tuple[int, ...] = (0,)
    gradient_bytes: tuple[int, ...] = (0,)
    fixed_bytes: int = 0
    where: tuple[str, ...] = ()
    loose: bool = False
    numels: tuple[float, ...] = ()
    saved_bytes: tuple[int, ...] = (0,)
    held_bytes: tuple[int, int] = (0, 0)
    waiting_bytes: int = 0
    last: int = -1
    stops: frozenset[int] = frozenset()
    spare_works: tuple[Work | None, ...] = ()
    spare_share: float = 0.0
    packed: tuple[int | None, ...] = ()
    costs: tuple[tuple[float, int], ...] = ()
    composites: dict[int, Composite] = field(default_factory=dict)


@dataclass
class _Stay:
    """One stay of a value in memory."""

    made_at: int
    last_read: int | None = None
    """The last position at which the tape itself reads the value: to make a call again, or to answer a handle."""
    asks: list[int] = field(default_factory=list)


def script_of(plan: Plan, path: Path) -> Script:
    """The script that carries out the plan of a recorded program. O(runs + reads)."""
    return _Compiler(plan.program, plan, path).script()


class _Compiler:
    def __init__(self, program: Program, plan: Plan, path: Path) -> None:
        self.program, self.plan, self.path = program, plan, path
        made = [i for i, v in enumerate(program.values) if not v.fixed]
        self.number = {v: n for n, v in enumerate(made)}
        self.stops = self._stops(program)
        order = plan.schedule.order
        self.again = self._reruns(order)
        self.passing = Lifetimes(program, order, {i: p for p, i in reversed(list(enumerate(order)))}).passing
        self.stays = self._stays(order)
        self.pack_at = self._packs_at(order)

    def script(self) -> Script:
        program, path, plan = self.program, self.path, self.plan
        order = plan.schedule.order
        kept_packs = self._kept_packs()
        packs = tuple(None if j in kept_packs or v is None else v for j, v in enumerate(path.packed))
        self._find_last_reads(order, packs)
        timeline = simulate(program, plan.schedule)
        acts = self._acts(order, packs)
        reruns = [r for act in acts for r in act.reruns]
        ready = frozenset(r.call for r in reruns)
        hold = frozenset(self.number[v] for v, ss in self.stays.items() if ss[0].last_read is not None)
        matter = self._matter(ready, packs) | hold
        last = next((j for j in reversed(path.asks) if 0 <= j < len(packs)), -1)
        asked = frozenset(j for j in (last, *(a.pack for a in acts)) if j >= 0 and packs[j] is None)
        held_at = {
            c.packs[0] + i: v for c in path.calls for i, v in c.saved if v in hold and packs[c.packs[0] + i] is None
        }
        hooked = {j for j, v in enumerate(packs) if v is not None} | asked | held_at.keys()
        inside = {j for c in path.calls for j in range(*c.packs)}
        works = tuple(self._work(k, c, ready, hold, matter, hooked) for k, c in enumerate(path.calls))
        spare_works = self._spare_works(works, ready, hold)
        n_spare = sum(work is not None and work.spare and not work.ready for work in spare_works)
        return Script(
            funcs=tuple(c.func for c in path.calls),
            works=works,
            packs=packs,
            asked=asked,
            acts=acts,
            hold=hold,
            kept=frozenset(v for j, v in enumerate(path.packed) if v is not None and packs[j] is None),
            hold_at=held_at,
            loose=not hooked <= inside,
            twice=self._twice(ready, timeline),
            budget_bytes=plan.budget_bytes,
            beside_bytes=self._beside(timeline),
            gradient_bytes=self._gradients(order),
            fixed_bytes=program.fixed_bytes,
            where=self._where(),
            numels=tuple(c.numel or math.inf for c in path.calls),
            saved_bytes=self._saved(),
            held_bytes=(held_bytes(program, plan.schedule, timeline), held_bytes(program)),
            waiting_bytes=waiting_bytes(program),
            last=last,
            stops=self.stops,
            spare_works=spare_works,
            spare_share=n_spare * _SPARE_SECONDS / (sum(op.seconds for op in program.ops) or 1.0),
            packed=path.packed,
            costs=self._costs(),
            composites=untouched(path.composites, works),
        )

    # ---- stays ---------------------------------------------------------------------------------------------------

    def _stops(self, program: Program) -> frozenset[int]:
        """Values that a run of their call can hand out before its end."""
        end = {op.call: i for i, op in enumerate(program.ops) if op.call >= 0}
        found = set()
        for v, n in self.number.items():
            available, maker = program.values[v].available, program.producer[v]
            if available is not None and 0 <= available < end.get(program.ops[maker].call, -1):
                found.add(n)
        return frozenset(found)

    @staticmethod
    def _reruns(order: tuple[int, ...]) -> set[int]:
        seen: set[int] = set()
        positions = set()
        for p, i in enumerate(order):
            if i in seen:
                positions.add(p)
            seen.add(i)
        return positions

    def _packs_at(self, order: tuple[int, ...]) -> dict[int, int]:
        """For every position at which the backward asks the number of the pack."""
        asks = iter(self.path.asks)
        return {p: next(asks) for p, i in enumerate(order) if self.program.ops[i].name == "unpack"}

    def _stays(self, order: tuple[int, ...]) -> dict[int, list[_Stay]]:
        """For every value its stays. What is still there when a call makes it again stays, and the new copy goes."""
        stays: dict[int, list[_Stay]] = {}
        for p, i in enumerate(order):
            op = self.program.ops[i]
            if op.name == "unpack" and op.reads[0] in stays:
                stays[op.reads[0]][-1].asks.append(p)
            for v in op.writes:
                if (p, v) not in self.passing:
                    stays.setdefault(v, []).append(_Stay(p))
        return stays

    def _kept_packs(self) -> set[int]:
        """Packs that are asked for, if at all, while what the forward made is still there."""
        later = set()
        for ss in self.stays.values():
            later |= {self.pack_at[p] for s in ss[1:] for p in s.asks}
        return set(range(len(self.path.packed))) - later

    def _find_last_reads(self, order: tuple[int, ...], packs: tuple[int | None, ...]) -> None:
        """Note, for every stay, where the tape itself needs the value last."""
        current: dict[int, int] = {}
        written: dict[int, int] = {}
        for p, i in enumerate(order):
            op = self.program.ops[i]
            if p in self.again:
                block = self._block_begin(p, order)
                for v in op.reads:
                    if v in current and written[v] < block:
                        self.stays[v][current[v]].last_read = p
            elif op.name == "unpack":
                v, j = op.reads[0], self.pack_at[p]
                if v in current and j >= 0 and packs[j] is not None:
                    self.stays[v][current[v]].last_read = p
            for v in op.writes:
                written[v] = p
                if (p, v) not in self.passing:
                    current[v] = current.get(v, -1) + 1

    def _block_begin(self, p: int, order: tuple[int, ...]) -> int:
        """The position of the first run of the call's block that the further run at p belongs to."""
        call = self.program.ops[order[p]].call
        while p - 1 in self.again and self.program.ops[order[p - 1]].call == call and order[p - 1] < order[p]:
            p -= 1
        return p

    # ---- acts ----------------------------------------------------------------------------------------------------

    def _acts(self, order: tuple[int, ...], packs: tuple[int | None, ...]) -> tuple[Act, ...]:
        drops: dict[int, list[int]] = {}
        for v, ss in self.stays.items():
            for s in ss:
                if s.last_read is not None:
                    drops.setdefault(s.last_read, []).append(self.number[v])
        installed = {(s.made_at, v) for v, ss in self.stays.items() for s in ss if s.last_read is not None}
        acts: list[Act] = []
        pending: list[Rerun] = []
        block: list[int] = []
        for p, i in enumerate(order):
            op = self.program.ops[i]
            if p in self.again:
                block.append(p)
                after = p + 1
                if not (after in self.again and self.program.ops[order[after]].call == op.call and order[after] > i):
                    pending.append(self._rerun(block, order, installed, drops))
                    block = []
            elif op.name == "unpack":
                v, j = op.reads[0], self.pack_at[p]
                is_handle = j >= 0 and packs[j] is not None
                if pending or is_handle:
                    value = self.number.get(v, -1)
                    acts.append(Act(j, value, tuple(pending), is_handle and value in drops.get(p, ())))
                    pending = []
        return tuple(acts)

    def _rerun(
        self, block: list[int], order: tuple[int, ...], installed: set[tuple[int, int]], drops: dict[int, list[int]]
    ) -> Rerun:
        ops = self.program.ops
        install = frozenset(self.number[v] for p in block for v in ops[order[p]].writes if (p, v) in installed)
        gone = frozenset(n for p in block for n in drops.get(p, ()))
        return Rerun(ops[order[block[0]]].call, install, gone)

    # ---- works ---------------------------------------------------------------------------------------------------

    def _matter(self, ready: frozenset[int], packs: tuple[int | None, ...]) -> frozenset[int]:
        """Values that the tape must know when it sees them."""
        read = {v for k in ready for _, v in self.path.calls[k].reads}
        return frozenset(read | {v for v in packs if v is not None})

    def _work(
        self, k: int, call: Call, ready: frozenset[int], hold: frozenset[int], matter: frozenset[int],
        hooked: Collection[int],
    ) -> Work | None:  # fmt: skip
        makes = {v for _, v in call.results} | {new for _, _, new in call.written}
        is_hooked = any(j in hooked for j in range(*call.packs))
        if not (k in ready or is_hooked or call.written or call.effects or call.leaves or makes & matter):
            return None
        stops = frozenset(v for _, v in call.saved if v in self.stops)
        written = frozenset(i for i, _, _ in call.written)
        return Work(call, k in ready, frozenset(makes & hold), stops, is_hooked, dict(call.reads), written)

    def _spare_works(
        self, works: Sequence[Work | None], ready: frozenset[int], hold: frozenset[int]
    ) -> tuple[Work | None, ...]:
        """What there is to do where all is prepared that may be made again, and everything saved is looked at."""
        spare = self._may_run_again()
        saved = {j: v for j, v in enumerate(self.path.packed) if v is not None}
        matter = frozenset({v for k in spare for _, v in self.path.calls[k].reads}.union(saved.values()))
        found: list[Work | None] = []
        for k, (call, work) in enumerate(zip(self.path.calls, works, strict=True)):
            other = self._work(k, call, ready, hold, matter, saved)
            if work is not None and other is not None:
                other = replace(work, hooked=work.hooked or other.hooked)
            other = other or work
            if k in spare and other is None:
                other = self._work(k, call, spare, hold, matter, saved)
            found.append(other if other is None else replace(other, spare=k in spare))
        return tuple(found)

    def _may_run_again(self) -> frozenset[int]:
        """Calls of which nothing is known that speaks against another run."""
        ops = self.program.ops
        able = {op.call for op in ops} - {op.call for op in ops if op.call >= 0 and op.repeatable}
        calls = enumerate(self.path.calls)
        return frozenset(k for k, c in calls if k in able and not c.leaves and set(c.effects) <= set(c.statistics))

    def _costs(self) -> tuple[tuple[float, int], ...]:
        """For every call the seconds of another run, and the bytes of what it makes and takes beside."""
        found = [(0.0, 0)] * len(self.path.calls)
        for op in (self.program.ops[i] for i in self.program.forward):
            if 0 <= op.call < len(found):
                seconds, nbytes = found[op.call]
                made = sum(self.program.values[v].nbytes for v in op.writes)
                found[op.call] = seconds + op.again_seconds, nbytes + made + op.scratch_bytes
        return tuple(found)

    def _twice(self, ready: frozenset[int], timeline: Timeline) -> frozenset[int]:
        """Calls whose results, and copies of what they overwrite, fit in once more at their first run."""
        resident: dict[int, int] = {}
        written: Counter[int] = Counter()
        for i, nbytes in zip(self.plan.schedule.order, timeline.resident_bytes, strict=True):
            call = self.program.ops[i].call
            if call in ready and i not in resident:
                resident[i] = nbytes
        worst: dict[int, int] = {}
        for i, nbytes in resident.items():
            op = self.program.ops[i]
            worst[op.call] = max(worst.get(op.call, 0), nbytes)
            written[op.call] += sum(self.program.values[v].nbytes for v in op.writes)
            written[op.call] += sum(self.program.values[old].nbytes for _, old in op.in_place)
        return frozenset(k for k, nbytes in worst.items() if nbytes + written[k] <= self.plan.budget_bytes)

    def _beside(self, timeline: Timeline) -> tuple[int, ...]:
        """The most bytes that are not values held by the tape: in the forward, and from each request to the next."""
        order = self.plan.schedule.order
        change = [0] * (len(order) + 1)
        for v, ss in self.stays.items():
            for s in ss:
                ends = [p for p in (s.last_read, *s.asks) if p is not None]
                if ends:
                    change[s.made_at] += self.program.values[v].nbytes
                    change[max(ends) + 1] -= self.program.values[v].nbytes
        found = [0]
        for i, resident, held in zip(order, timeline.resident_bytes, accumulate(change), strict=False):
            if self.program.ops[i].name == "unpack":
                found.append(0)
            found[-1] = max(found[-1], resident - held)
        return tuple(found)

    def _gradients(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """The bytes of gradients of parameters: in the forward, and from each request on."""
        found, last = [0], 0
        for i in order:
            op = self.program.ops[i]
            if op.name == "unpack":
                found.append(last)
            taken_over = {new for new, _ in op.in_place}
            made = (self.program.values[v] for v in op.writes if v not in taken_over)
            last += sum(value.nbytes for value in made if value.kind == "gradient")
        return tuple(found)

    def _saved(self) -> tuple[int, ...]:
        """What is kept, and not by the tape, after so many calls."""
        found = [0] * (len(self.path.calls) + 1)
        for v, (first, *_) in self.stays.items():
            call = self.program.ops[self.program.producer[v]].call
            if first.last_read is None and first.asks and 0 <= call < len(self.path.calls):
                found[call + 1] += self.program.values[v].nbytes
        return tuple(accumulate(found))

    def _where(self) -> tuple[str, ...]:
        found = [""] * len(self.path.calls)
        for i in self.program.forward:
            op = self.program.ops[i]
            if 0 <= op.call < len(found):
                found[op.call] = f"{op.name} in {op.module or 'the step'} ({op.source or 'unknown line'})"
        return tuple(found)
