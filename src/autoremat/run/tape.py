"""The tape: what the forward did, operator by operator, so that parts of it can run again when the backward asks.

While the forward runs, a dispatch mode sees every operator below autograd and autocast, and saved-tensor hooks turn
what autograd wants to save into handles. Afterwards the handles hold the tape. When the backward asks a handle for a
value that is gone, the tape runs again the operators that the plan names: no Python of the model, no graph, the same
random numbers, the same numeric settings, in-place operators on copies.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoremat.record.as_plain import as_plain, autocast_around, enter_formula, is_in_one_piece, run_op, take_apart
from autoremat.record.compiled import in_compiled_code
from autoremat.record.facts import OpFacts, facts_of, tensors_given, tensors_in
from autoremat.record.local import PackedLocal, description_of, is_apart, is_taken_apart, local_of
from autoremat.record.signature import signature_of
from autoremat.record.smoothing import Smoothing
from autoremat.record.timing import estimate
from autoremat.record.values import Seen, ValueMap, View, is_parameter, storage_of
from autoremat.run.entry import (
    DRAWING,
    Entry,
    ModifiedInPlace,
    OutsideHandle,
    Replay,
    Unfinished,
    alias_of,
    modified,
    prepare,
    version_of,
)
from autoremat.run.instructions import Instructions, Rerun
from autoremat.run.memory import free_memory, is_out_of_memory
from autoremat.run.online import Online
from autoremat.run.selfcheck import Memory, SelfCheck
from autoremat.run.settings import set_state, state_of

_NO_TASK = -1
_SLACK = 0.05
"""How far apart the backward of the plan and one off its path may be, as a share of all requests ..."""
_MORE = 8
"""... and so many requests more."""
_NOTHING: frozenset[int] = frozenset()
_UNREAD: tuple[tuple[int, ...], bool] = ((), False)


class Handle:
    """Stands for a saved tensor: which value, seen how; notices when the value is changed behind autograd's back."""

    __slots__ = ("number", "probe", "served", "tape", "version", "view")

    def __init__(self, tape: Tape, number: int, tensor: Tensor, probe: Tensor) -> None:
        self.tape, self.number, self.view = tape, number, View.of(tensor)
        self.probe, self.version = probe, tensor._version
        self.served = 0
        """The backward pass, counted by the tape, in which it was served last."""
        tape.handles[number] = tape.handles.get(number, 0) + 1
        tape.waiting[number] = tape.waiting.get(number, 0) + 1
        tape.packed += 1

    def check_unchanged(self) -> None:
        """Raise what autograd would raise if the saved tensor has been modified in place."""
        if self.probe._version != self.version:
            raise modified(self.view, self.probe, self.version)

    def __del__(self) -> None:
        self.tape.released(self)


@dataclass(slots=True)
class _Held:
    """A value in memory, and whether it is the one that the forward made: then an alias tells its version."""

    memory: torch.UntypedStorage
    original: bool
    alias: Tensor | None = None
    version: int | None = None

    def storage(self) -> torch.UntypedStorage:
        """The memory; raises if somebody changed a value of the forward in place since."""
        if self.alias is not None and self.version is not None and version_of(self.alias) != self.version:
            raise modified(self.alias, self.alias, self.version)
        return self.memory


class Tape(TorchDispatchMode):
    """One forward under a plan, and its backward.

    Args:
        instructions: what to hold, what to forget, what to run again.
        on_deviation: called once, with a reason, when the forward takes another path than the plan's.
        on_rerun: called with its seconds at every op that has run again.
        on_out_of_memory: called with the allocator's error where running again fails for good; its result is raised.
        check: compares what runs again with what ran first.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiler wrapper around ``__torch_dispatch__``: a tape does not run under ``torch.compile``."""
        return False

    def __init__(
        self,
        instructions: Instructions,
        on_deviation: Callable[[str], None] = lambda reason: None,
        on_rerun: Callable[[float], None] = lambda seconds: None,
        on_out_of_memory: Callable[[BaseException], BaseException] = lambda error: error,
        check: SelfCheck | None = None,
    ) -> None:
        super().__init__()
        self.instructions = instructions
        self.following = True
        self.handles: dict[int, int] = {}
        """For every value the number of handles that live."""
        self.waiting: dict[int, int] = {}
        """How many of them have not been served in this backward pass."""
        self._on_deviation, self._on_rerun, self._on_out_of_memory = on_deviation, on_rerun, on_out_of_memory
        self._check = check
        self._generators: dict[int, tuple[torch.Generator, bytearray]] = {}
        self._online: Online | None = None
        self._pinned: set[int] = set()
        """Values that the plan would drop and that turned out to be kept."""
        self._lingering: list[weakref.ref[torch.UntypedStorage]] = []
        self._overwritten_outside: set[int] = set()
        """What this forward has overwritten of what it did not make."""
        self.has_effects = False
        """Whether the forward has, or may have, changed what it did not make, so that it cannot be run once more."""
        self._excess_bytes = self._kept_excess_bytes = self._largest_bytes = 0
        self.sizes: dict[int, int] = {}
        """What values take for real, where it checks: fake kernels err about workspaces."""
        self._map: ValueMap | None = ValueMap()
        self.n_ops = 0
        self._held: dict[int, _Held] = {}
        self._entries: dict[int, Entry] = {}
        self._maker: dict[int, int] = {}
        self._moved: dict[int, int] = {}
        self._late: set[int] = set()
        self._installs_left = Counter(instructions.installs)
        self._outside: dict[int, list[OutsideHandle]] = {}
        self._smoothing = Smoothing()
        self._n_on_path = len(instructions.path)
        self._cursor = 0
        self._task: int | None = None
        self._pass = 1
        self._retained = self._differentiated = False
        """Whether the graph outlives the backward pass that runs; whether that pass makes a graph of its own."""
        self._served = self.packed = 0
        self._rerunning = False
        self._gone: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    # ---- forward -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator of the forward and take note of it."""
        kwargs = kwargs or {}
        if types and is_taken_apart(types):
            return NotImplemented
        facts = facts_of(func)
        if is_in_one_piece(facts, args, kwargs):
            return take_apart(facts, func, self, args, kwargs)
        if facts.is_view:
            return func._op(*args, **kwargs)
        autocast = autocast_around(facts)
        if self._rerunning or self._map is None:
            return run_op(func, args, kwargs, autocast)
        if func is not (instead := self._smoothing.replaced(func, args))[0]:
            func, args = instead
            facts = facts_of(func)
        unchecked = facts.is_plain and self._check is None
        if unchecked and self.n_ops not in self.instructions.ready and self._expects(facts.name):
            out = run_op(func, args, kwargs, autocast)
            self._note_plain(out)
            return out
        written = facts.written(args, kwargs)
        if written or self.n_ops in self.instructions.ready or not self._expects(facts.name) or self._check:
            inputs = tensors_given(args, kwargs)
            reads = self._map.reads(inputs)
            expected = self._expects(facts.name, reads[0])
            if self._check is not None:
                self._look_at(inputs)
        else:  # what it makes gets its numbers in any case; that nobody asks what it read saves time
            inputs, reads, expected = [], _UNREAD, True
        rescued = self._rescue(written, expected) if written else _NOTHING
        if facts.never_again or any(self._is_outside(t) for t in written):
            self.has_effects = True  # before it runs: it may run out of memory half-way
        entry, memory = None, Memory()
        if facts.random:
            self._remember_generators((*args, *kwargs.values()))
            DRAWING.acquire()
        try:
            if self._may_run_again(facts, expected, reads, written):
                entry = prepare(func, facts, args, kwargs, autocast, self._map, self._outside)
                if self._check is not None and expected:
                    memory = self._check.arguments(self.n_ops, self._map, inputs, written)
            out = run_op(func, args, kwargs, autocast)
        finally:
            if facts.random:
                DRAWING.release()
        if facts.counts_inside:
            torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
        outputs = tensors_in(out)
        seen = self._map.seen(facts, args, kwargs, reads, outputs)
        if seen.is_op:
            if self.following and not expected:
                self._leave_path(facts.name)
            self._note(seen, entry, outputs, rescued, memory)
            if self._online is not None:
                if self.n_ops - 1 in self._entries:
                    cost = estimate(signature_of(func, args, kwargs), sum(t.nbytes for t in outputs))
                    self._online.ran(self.n_ops - 1, cost.seconds, reads[0], [n for n, _ in seen.writes])
                self._shrink()
        return out

    def _note_plain(self, out: Any) -> None:
        """Hold what the plan says of what an op has made that the plan expects, and of which nothing else is asked."""
        assert self._map is not None
        is_op = False
        for tensor in tensors_in(out):
            storage = storage_of(tensor)
            number = None if storage is None else self._map.bind_new(storage)
            if storage is not None and number is not None:  # else a view of what was there before
                is_op = True
                self._weigh(number, storage.nbytes())
                self._hold_as_planned(number, tensor, storage)
        if is_op:
            self.n_ops += 1

    def has_made(self, tensor: Tensor) -> bool:
        """Whether this forward has made what the tensor looks at."""
        storage = storage_of(tensor)
        return storage is not None and self._map is not None and self._map.number(storage) >= 0

    def rewind(self) -> None:
        """Put the generators that were handed to operators back to where the forward found them."""
        for generator, state in self._generators.values():
            set_state(generator, state)

    def _remember_generators(self, arguments: Sequence[Any]) -> None:
        for g in arguments:
            if isinstance(g, torch.Generator) and id(g) not in self._generators:
                self._generators[id(g)] = g, state_of(g)

    def _may_run_again(
        self, facts: OpFacts, expected: bool, reads: tuple[tuple[int, ...], bool], written: Sequence[Tensor]
    ) -> bool:
        """Whether to prepare for another run: the plan says so, or, off its path, nothing is known against it."""
        if expected and self.following:
            return self.n_ops in self.instructions.ready
        if self._online is None or facts.never_again or facts.uninitialised or facts.fresh_constant:
            return False
        if not facts.batch_norm and any(self._is_outside(t) for t in written):
            return False
        return not reads[1] and all(self._is_at_hand(n) for n in reads[0])

    def _is_outside(self, tensor: Tensor) -> bool:
        storage = storage_of(tensor)
        return storage is None or self._map is None or self._map.number(storage) < 0

    def _is_at_hand(self, number: int) -> bool:
        """Whether another run can read this value: it is held, can be made again, or is from outside and as it was."""
        if number < 0:
            return number not in self._overwritten_outside
        return number in self._held or number in self._maker

    def _note(
        self,
        seen: Seen,
        entry: Unfinished | None,
        outputs: Sequence[Tensor],
        rescued: frozenset[int],
        memory: Memory,
    ) -> None:
        """Hold what the plan says."""
        k, self.n_ops = self.n_ops, self.n_ops + 1
        if seen.effects:
            self._overwritten_outside.update(seen.effects)
        for new, old in seen.in_place:
            self._overwritten(new, old, rescued)
        if entry is not None and (self.following or (not seen.opaque and (not seen.effects or entry.only_statistics))):
            self._entries[k] = ready = entry.finish(seen, outputs)
            for n, _ in seen.writes:
                self._maker[n] = k
            if self._check is not None and (k in self.instructions.again or not self.following):
                made = dict(seen.writes)
                if self._differs(k, ready, made, memory):
                    self._pinned.update(made)
        for number, tensor in seen.writes:
            storage = tensor.untyped_storage()
            self._weigh(number, storage.nbytes())
            self._hold_as_planned(number, tensor, storage)

    def _hold_as_planned(self, number: int, tensor: Tensor, storage: torch.UntypedStorage) -> None:
        """Hold a value just made, if it is one to hold."""
        kept = self.following and (number in self.instructions.keep or number in self._pinned)
        if kept or (self.handles.get(number) and not self._forgets(number)):
            saved = number in self.instructions.asked and number not in self.handles  # then pack makes the alias
            self._held[number] = _Held(storage, True, None if saved else alias_of(tensor))

    def _weigh(self, number: int, nbytes: int) -> None:
        """Leave the path where values are larger than the plan's, and there is no room for that."""
        if self._check is not None:
            self.sizes[number] = nbytes
        if nbytes > self._largest_bytes:
            self._largest_bytes = nbytes
        grown = nbytes - self.instructions.sizes.get(number, nbytes)
        if grown and self.following and self._check is None:
            if number in self.instructions.keep:
                self._kept_excess_bytes += grown
            else:
                self._excess_bytes = max(self._excess_bytes, grown)
            excess = self._kept_excess_bytes + self._excess_bytes
            if excess > self.instructions.spare_bytes:
                self._deviate(f"its values take {excess:,} bytes more than in the recorded forward")

    def _forgets(self, number: int) -> bool:
        """Whether the plan lets go of this value although the backward will ask for it."""
        return self.following and number in self.instructions.forget and number not in self._pinned

    def _overwritten(self, new: int, old: int, rescued: frozenset[int]) -> None:
        """The memory of a value holds another one: that is what its handles stand for (see ``Recorder``)."""
        if old not in rescued:
            self._let_go(old)
        if old in self.handles:
            self.handles[new] = self.handles.pop(old)
            self.waiting[new] = self.waiting.pop(old)
            self._moved[old] = new

    # ---- the self-check ------------------------------------------------------------------------------------------

    def _differs(self, k: int, entry: Entry, made: dict[int, Tensor], memory: Memory) -> bool:
        assert self._check is not None
        with _Replaying(self) as replay:
            return self._check.differs(k, entry, made, memory, replay)

    def _look_at(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = storage_of(tensor)
            if storage is not None:
                self._look_at_value(storage)

    def _look_at_value(self, storage: torch.UntypedStorage) -> None:
        """Hold what something that torch does not see has changed: nothing can make it again."""
        assert self._map is not None
        assert self._check is not None
        number = self._map.number(storage)
        if self._check.has_changed(number, storage):
            self._pinned.add(number)
            if number not in self._held:
                self._held[number] = _Held(storage, True)

    # ---- off the path --------------------------------------------------------------------------------------------

    def _shrink(self, locked: Collection[int] = ()) -> None:
        """Off the path: let go of what can be made again until what is held is within what is allowed."""
        if self._online is None:
            return
        allowed = self._online.budget_bytes - self._beside_bytes()
        if self._held_bytes() <= allowed:
            return
        needed = self._needed()
        for n in [n for n in self._held if not self.handles.get(n) and n not in needed and n not in locked]:
            self._let_go(n)
        excess = self._held_bytes() - allowed
        if excess <= 0:
            return
        sizes = {n: max(1, h.memory.nbytes()) for n, h in self._held.items() if n not in locked and self._can_go(n)}
        while excess > 0 and sizes:
            number = self._online.pick(sizes, self._maker, self._held)
            if self._can_go(number):
                memory = weakref.ref(self._held[number].memory)
                self._let_go(number)
                if memory() is None:
                    excess -= sizes[number]
                else:
                    self._lingering.append(memory)
            del sizes[number]

    def _beside_bytes(self) -> float:
        """What everything else may take: as in the plan, and more where values are larger than there."""
        plan = self.instructions
        begin, end = 0, 1
        if self._map is None:  # in the backward: as far into it as this one is, and a little around that
            progress = self._served / max(1, self.packed)
            last = len(plan.beside_bytes) - 1
            begin, end = int((progress - _SLACK) * last) - _MORE, 1 + ceil((progress + _SLACK) * last) + _MORE
        beside = max(plan.beside_bytes[max(0, begin) : end])
        larger = max(1.0, self._largest_bytes / max(1, plan.largest_bytes))
        at_work = 2 * self._largest_bytes  # an op off the path reads and makes values that nobody holds yet
        return plan.fixed_bytes + larger * (beside - plan.fixed_bytes) + at_work

    def _held_bytes(self) -> int:
        """Bytes held, and bytes of what the tape has let go of and something else, Python most likely, still holds."""
        storages = [h.memory for h in self._held.values()]
        storages += [storage for ref in self._lingering if (storage := ref()) is not None]
        return sum({s._cdata: s.nbytes() for s in storages}.values())

    def _can_go(self, number: int) -> bool:
        """Whether a value can be made again from others that are held and stay."""
        if number in self._pinned or number not in self._maker:
            return False
        return all(n in self._held for n in self._sources([number]))

    def _sources(self, numbers: Collection[int]) -> set[int]:
        """What must be in memory so that these values can be made again: nothing makes it."""
        found = self._begins(numbers, lambda n: n in self._maker and n not in self._pinned)
        if all(n in self._held for n in found):
            return found
        anew = set[int]()  # some begin with what is gone: what they go through and is held must stay instead
        for n, k in sorted(self._maker.items(), key=lambda made: made[1]):
            if n not in self._pinned and all(r in anew or r in self._held for r in self._entries[k].reads):
                anew.add(n)
        return self._begins(numbers, anew.__contains__)

    def _begins(self, numbers: Collection[int], goes: Callable[[int], bool]) -> set[int]:
        """Where the ways to these values begin, if they may go through those that can go."""
        found, seen = set[int](), set[int]()
        pending = [r for n in numbers if n in self._maker for r in self._entries[self._maker[n]].reads]
        while pending:
            n = pending.pop()
            if n in seen:
                continue
            seen.add(n)
            if goes(n):
                pending.extend(self._entries[self._maker[n]].reads)
            else:
                found.add(n)
        return found

    def _rescue(self, written: Sequence[Tensor], expected: bool) -> frozenset[int]:
        """Copy what reruns will read and what cannot be made again once this op has overwritten it.

        That is what they need where the plan does not know the op, and always what turned out to differ.
        """
        assert self._map is not None
        rescued = set()
        for tensor in written:
            storage = storage_of(tensor)
            number = None if storage is None else self._map.number(storage)
            if number is None:
                continue
            if number < 0:
                self._rescue_outside(number)
            elif number in self._held and (number in self._pinned or (not expected and number in self._needed())):
                copy = self._held[number].storage().clone()
                self._let_go(number)
                self._held[number] = _Held(copy, original=True)
                rescued.add(number)
        return frozenset(rescued)

    def _rescue_outside(self, number: int) -> None:
        for handle in self._outside.pop(number, ()):
            if version_of(handle.alias) == handle.version:  # else the op that it is of overwrote it, or nobody asks
                handle.alias = handle.alias.clone(memory_format=torch.preserve_format)
                handle.version = version_of(handle.alias)

    def _expects(self, name: str, reads: Sequence[int] | None = None) -> bool:
        """Whether the plan has this op next."""
        path, k = self.instructions.path, self.n_ops
        return self.following and k < len(path) and _matches(path[k], name, reads)

    def _leave_path(self, name: str) -> None:
        path, k = self.instructions.path, self.n_ops
        name += ", of compiled code, which runs eagerly here" * in_compiled_code()
        if k >= len(path):
            self._deviate(f"operator {k} ({name}) comes after the end of the recorded forward")
        else:
            self._deviate(f"operator {k} is {name}, the recorded forward had {path[k][0]}")

    def _deviate(self, reason: str) -> None:
        self.following = False
        self._n_on_path = self.n_ops
        self._go_online()
        self._on_deviation(reason)

    def _go_online(self) -> None:
        """From now on hold no more than the budget leaves beside everything else, by the plan's account of it."""
        if self.instructions.budget_bytes is not None:
            self._online = Online(self.instructions.budget_bytes)
        if self._check is None and self.instructions.writes_unseen:
            self._check = SelfCheck()
        if self._check is not None:
            self._check.leave_path(self.n_ops)

    def pack(self, tensor: Tensor) -> Any:
        """A handle for what autograd wants to save."""
        if is_apart(tensor):
            return PackedLocal(self.pack(local_of(tensor)), description_of(tensor))
        storage = storage_of(tensor)
        number = -1 if storage is None or self._map is None else self._map.number(storage)
        if storage is None or number < 0 or is_parameter(tensor):
            alias = tensor if tensor.is_leaf else tensor.detach()  # a leaf is saved itself: its data may be replaced
            return OutsideHandle(alias, version_of(alias))
        with torch._C._DisableTorchDispatch():
            held, alias = self._held.get(number), tensor.detach()
            if held is None and not self._forgets(number):
                held = self._held[number] = _Held(storage, True)
            if self._online is not None:
                self._online.used(number)
            if held is not None and held.alias is None:
                held.alias = alias  # loses the memory when the tape lets go of the value
            else:
                _take_memory(alias)
            return Handle(self, number, tensor, alias)

    def finish_forward(self) -> None:
        """The forward is over: from now on the tape only answers the backward."""
        if self._check is not None and self._map is not None:
            with _Replaying(self):
                for storage in self._map.living():
                    self._look_at_value(storage)
        if self.following and self.n_ops < len(self.instructions.path):
            self._deviate(f"the forward ended after {self.n_ops} of {len(self.instructions.path)} operators")
        for number, held in self._held.items():
            if held.alias is not None:  # only now: an in-place op counts up the version after we have seen it
                held.version = version_of(held.alias)
            elif self.following and number in self.instructions.keep:
                self._deviate(f"the recorded forward saved value {number} for the backward, this one did not")
        self._shrink()
        self._map = None
        self._outside.clear()

    # ---- backward ------------------------------------------------------------------------------------------------

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that a handle stands for, computed again if it is gone."""
        if isinstance(packed, PackedLocal):
            return packed.description.around(self.unpack(packed.packed))
        tensor = packed.get() if isinstance(packed, OutsideHandle) else self._unpacked_alone(packed)
        if self._map is not None:  # a backward inside the forward
            enter_formula()
        return tensor

    def _unpacked_alone(self, packed: Handle) -> Tensor:
        """The tensor that a handle stands for; several threads may go backward through one graph."""
        with self._lock:
            try:
                return self._unpacked(packed)
            finally:
                self._settle()

    def _unpacked(self, packed: Handle) -> Tensor:
        number = self._now(packed.number)
        packed.check_unchanged()
        if torch._C._current_graph_task_id() == _NO_TASK:  # somebody looks at grad_fn._saved_...
            return packed.view.on(self._look_up(number))
        self._notice_task()
        if packed.served != self._pass:
            packed.served = self._pass
            self.waiting[number] -= 1
            self._served += 1
            self._shrink()
        try:
            tensor = self._serve(packed, number)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tensor = self._serve_in_need(packed, number)
        if self._map is not None:  # a backward inside the forward: its operators read this value
            self._map.rebind(tensor.untyped_storage(), number)
        return tensor

    def _serve(self, packed: Handle, number: int) -> Tensor:
        events = self.instructions.events
        if self.following and self._cursor < len(events) and events[self._cursor].value == number:
            event = events[self._cursor]
            self._cursor += 1
            if event.reruns:
                with _Replaying(self) as replay:
                    for rerun in event.reruns:
                        self._run_again(rerun.op, rerun, replay)
            tensor = self._saved(packed, self._storage(number))
            if event.drop:
                self._drop(number)
            return tensor
        if number in self.instructions.forget or number in self.instructions.keep:
            self.following = False  # another order than the plan's: compute on demand from here on
            self._go_online()
        return self._saved(packed, self._on_demand(number))

    def _serve_in_need(self, packed: Handle, number: int) -> Tensor:
        """The device has no room for what the plan does next: hold as little as possible, and try once more."""
        self.following, self._online = False, Online(0)
        self._shrink()
        free_memory()
        try:
            return self._saved(packed, self._on_demand(number))
        except (RuntimeError, MemoryError) as error:
            raise (self._on_out_of_memory(error) if is_out_of_memory(error) else error) from None

    def _saved(self, packed: Handle, storage: torch.UntypedStorage) -> Tensor:
        """The tensor that was saved, on the memory that holds its value now."""
        held = self._held.get(packed.number)
        with torch._C._DisableTorchDispatch():
            if held is not None and held.alias is packed.probe:  # the tensor itself
                return packed.probe.detach()
            return packed.view.on(storage)

    def _now(self, number: int) -> int:
        """The value that the memory of this one holds in the end."""
        while number in self._moved:
            number = self._moved[number]
        return number

    def _storage(self, number: int) -> torch.UntypedStorage:
        held = self._held.get(number)
        return held.storage() if held is not None else self._on_demand(number)

    def _notice_task(self) -> None:
        """A new backward pass begins: after one that retained the graph, the plan starts anew."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            if self._retained:
                self._cursor = 0
                self._pass += 1
                self._served = 0
                self.waiting = dict(self.handles)
                self._installs_left = Counter(self.instructions.installs)
                self._held = {n: h for n, h in self._held.items() if h.original}
            if self._differentiated:  # a node behind a CopySlices may now run twice in one pass: once by itself
                self.following = False
                self._go_online()
            self._task = task
            self._differentiated = torch.is_grad_enabled()
            self._retained = self._differentiated or torch._C._autograd._get_current_graph_task_keep_graph()

    def _drop(self, number: int) -> None:
        """Let go of a value, unless a part of the graph that was not recorded still waits for it."""
        held = self._held.get(number)
        if held is None or (self._retained and held.original) or number in self._pinned:
            return
        if self._is_awaited(number):
            self._late.add(number)
        else:
            self._let_go(number)

    def _let_go(self, number: int) -> None:
        held = self._held.pop(number, None)
        if held is not None and held.alias is not None:
            _take_memory(held.alias)

    def _is_awaited(self, number: int) -> bool:
        """Whether a handle stands for a value that the plan will not make again."""
        return self.waiting.get(number, 0) > 0 and not self._installs_left[number]

    def released(self, handle: Handle) -> None:
        """A handle is gone; what only handles needed may go when the last one has."""
        self._gone.append((handle.number, handle.served))
        if self._lock.acquire(blocking=False):  # a finalizer cannot wait: it may have interrupted who holds the lock
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Take note of the handles that are gone."""
        while self._gone:
            number, served = self._gone.popleft()
            number = self._now(number)
            self.handles[number] -= 1
            if served != self._pass:
                self.waiting[number] -= 1
            if not self.handles[number] and not self._is_planned(number):
                self._let_go(number)

    def _is_planned(self, number: int) -> bool:
        """Whether something else than handles decides how long a value stays: each of its stays has its own plan."""
        if self.following:
            held, instructions = self._held.get(number), self.instructions
            if number in self._pinned and number in instructions.installs:  # the run that would make it again does not
                return True
            stays = instructions.keep if held is not None and held.original else instructions.installs
            return number in stays and number not in self._late
        return number in self._needed()

    def _needed(self) -> set[int]:
        """What must stay in memory for the handles whose values will have to be made again."""
        gone = [n for n, c in self.handles.items() if c and not (n in self._held and self._held[n].original)]
        return self._sources(gone)

    def _look_up(self, number: int) -> torch.UntypedStorage:
        before, online = dict(self._held), self._online
        self._online = None  # what is held now must stay
        try:
            return self._on_demand(number)
        finally:
            self._held, self._online = before, online

    def _on_demand(self, number: int) -> torch.UntypedStorage:
        """Compute a value again from what there is, whatever the plan says; keep what handles still ask for."""
        if number not in self._held:
            ops = self._missing_ops(number)
            uses = Counter(n for k in ops for n in self._entries[k].reads)
            with _Replaying(self) as replay:
                for k in ops:
                    self._run_again(k, None, replay)
                    uses.subtract(self._entries[k].reads)
                    self._shrink(locked={number, *(n for n, count in uses.items() if count > 0)})
            needed = self._needed()
            for n in [n for n, h in self._held.items() if not h.original]:
                if n != number and not self.handles.get(n) and n not in needed:
                    del self._held[n]
        if self._online is not None:
            self._online.used(number)
        return self._held[number].storage()

    def _missing_ops(self, number: int) -> list[int]:
        """The ops that have to run again for a value, in order."""
        needed: set[int] = set()
        pending = [number]
        while pending:
            n = pending.pop()
            if n in self._held:
                continue
            k = self._maker.get(n)
            if k is None:
                raise RuntimeError(
                    f"autoremat let go of value {n} and cannot compute it again on this path of the backward; "
                    "this is a bug in autoremat: run this step without it (autoremat.restore) and report it"
                )
            if k not in needed:
                needed.add(k)
                pending.extend(self._entries[k].reads)
        return sorted(needed)

    def _run_again(self, k: int, rerun: Rerun | None, replay: Replay) -> None:
        """Run op k again. Without a rerun of the plan everything that it makes is held."""
        entry = self._entries[k]
        memory = {n: self._storage(n) for n in entry.reads}
        begin = perf_counter()
        for new, old in entry.in_place:
            ends = rerun is not None and old in rerun.drops and not self._is_awaited(old)
            ends = ends and not self._held[old].original
            if ends:
                del self._held[old]
            else:
                memory[old] = memory[old].clone()
            memory[new] = memory[old]
        try:
            made = entry.run(memory, replay)
        except ModifiedInPlace as error:
            raise ModifiedInPlace(f"{error} {self._needed_for(k)}") from None
        if self._pinned:
            made = {n: m for n, m in made.items() if n not in self._pinned}
        if self._check is not None:
            self._check.compare(k, entry, made)
        for n, storage in made.items():
            if rerun is None:
                if n not in self._held:
                    self._held[n] = _Held(storage, original=False)
            elif n in rerun.install:
                self._installs_left[n] -= 1
                self._held[n] = _Held(storage, original=False)
        if rerun is not None:
            for n in rerun.drops:
                self._drop(n)
        self._on_rerun(perf_counter() - begin)

    def _needed_for(self, k: int) -> str:
        """Why op k needs what it read from outside as it was, and what to do: autograd itself may not have saved it."""
        module, source = (
            self.instructions.where[k] if k < min(self._n_on_path, len(self.instructions.where)) else ("", "")
        )
        name = self._entries[k].func
        return (
            f"autoremat needs it as it was to run {name} in {module or 'the step'} ({source or 'unknown line'}) again. "
            "Change it after the backward, hand over a clone of it, or have what this operator makes kept "
            f'(keep="{name}").'
        )

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The block in which the forward runs."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        with as_plain(), self, hooks:
            yield
            self.finish_forward()


class _Replaying(Replay):
    """A block of further runs, which are no part of the forward."""

    __slots__ = ("_outer", "_tape")

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __enter__(self) -> _Replaying:
        self._outer, self._tape._rerunning = self._tape._rerunning, True
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._tape._rerunning = self._outer


def _matches(step: tuple[str, tuple[int, ...]], name: str, reads: Sequence[int] | None) -> bool:
    """Whether an op is the one that was recorded, by its name and, if they are given, by what it reads.

    In a backward inside the forward, the program also lists what the autograd node holds; those come last.
    """
    if reads is None:
        return step[0] == name
    made = tuple(n for n in reads if n >= 0)
    return step[0] == name and step[1][: len(made)] == made


_EMPTY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _take_memory(alias: Tensor) -> None:
    """Leave the alias its version counter, but not the memory."""
    key = alias.dtype, alias.device
    with torch._C._DisableTorchDispatch():  # in a finalizer none of this is to be seen as part of the forward
        if key not in _EMPTY:
            _EMPTY[key] = torch.empty(0, dtype=alias.dtype, device=alias.device)
        alias.data = _EMPTY[key]
