"""The tape: what the forward did, operator by operator, so that parts of it can run again when the backward asks.

While the forward runs, a dispatch mode sees every operator below autograd and autocast, and saved-tensor hooks turn
what autograd wants to save into handles. Afterwards the handles hold the tape. When the backward asks a handle for a
value that is gone, the tape runs again the operators that the plan names: no Python of the model, no graph, the same
random numbers, the same numeric settings, in-place operators on copies.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recollect.record.facts import RUNNING_STATISTICS, OpFacts, facts_of, tensors_in
from recollect.record.values import Seen, ValueMap, View, is_parameter, storage_of
from recollect.run.instructions import Instructions, Rerun
from recollect.run.settings import NumericSettings

_NO_TASK = -1
_NOTHING: frozenset[int] = frozenset()
_UNREAD: tuple[tuple[int, ...], bool] = ((), False)

_DRAWING = threading.RLock()
"""Held while a generator's state is taken and used, or changed for a while: other threads may draw from it too."""


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

    def check_unchanged(self) -> None:
        """Raise what autograd would raise if the saved tensor has been modified in place."""
        if self.probe._version != self.version:
            raise _modified(self.view, self.probe, self.version)

    def __del__(self) -> None:
        self.tape.released(self)


class OutsideHandle:
    """Stands for a saved tensor that the forward did not make (a parameter, an input): itself or an alias of it."""

    __slots__ = ("alias", "version")

    def __init__(self, alias: Tensor, version: int) -> None:
        self.alias, self.version = alias, version

    def get(self) -> Tensor:
        """The tensor; raises what autograd would raise if it has been modified in place since."""
        if version_of(self.alias) != self.version:
            raise _modified(self.alias, self.alias, self.version)
        return self.alias


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
            raise _modified(self.alias, self.alias, self.version)
        return self.memory


@dataclass(frozen=True, slots=True)
class _Made:
    """An argument that looks at a value of the forward."""

    number: int
    view: View


@dataclass(frozen=True, slots=True)
class _Entry:
    """An op of the forward, ready to run again."""

    func: torch._ops.OpOverload
    args: Any
    kwargs: Any
    outputs: tuple[tuple[int, int], ...]
    """Pairs (position among the tensors of the result, value)."""
    in_place: tuple[tuple[int, int], ...]
    reads: tuple[int, ...]
    generator: torch.Generator | None
    generator_state: bytearray | None
    settings: NumericSettings
    checksum: int | None
    """Of what a random op drew, where other threads might have drawn in between."""


class Tape(TorchDispatchMode):
    """One forward under a plan, and its backward.

    Args:
        instructions: what to hold, what to forget, what to run again.
        on_deviation: called once, with a reason, when the forward takes another path than the plan's.
        on_rerun: called at every op that runs again.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No compiler wrapper around ``__torch_dispatch__``: a tape does not run under ``torch.compile``."""
        return False

    def __init__(
        self,
        instructions: Instructions,
        on_deviation: Callable[[str], None] = lambda reason: None,
        on_rerun: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.instructions = instructions
        self.following = True
        self.handles: dict[int, int] = {}
        """For every value the number of handles that live."""
        self.waiting: dict[int, int] = {}
        """How many of them have not been served in this backward pass."""
        self._on_deviation, self._on_rerun = on_deviation, on_rerun
        self._map: ValueMap | None = ValueMap()
        self._n_ops = 0
        self._held: dict[int, _Held] = {}
        self._entries: dict[int, _Entry] = {}
        self._maker: dict[int, int] = {}
        self._moved: dict[int, int] = {}
        self._late: set[int] = set()
        self._installs_left = Counter(instructions.installs)
        self._outside: dict[int, list[OutsideHandle]] = {}
        self._cursor = 0
        self._task: int | None = None
        self._pass = 1
        self._retained = False
        self._rerunning = False
        self._gone: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    # ---- forward -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator of the forward and take note of it."""
        kwargs = kwargs or {}
        facts = facts_of(func)
        if facts.is_view or self._rerunning or self._map is None:
            return func(*args, **kwargs)
        written = facts.written(args, kwargs)
        if written or self._n_ops in self.instructions.again or not self._expects(facts.name):
            reads = self._map.reads(tensors_in((args, kwargs)))
            expected = self._expects(facts.name, reads[0])
        else:  # what it makes gets its numbers in any case; that nobody asks what it read saves time
            reads, expected = _UNREAD, True
        rescued = self._rescue(written, expected) if written else _NOTHING
        entry = None
        if expected and self._n_ops in self.instructions.again:
            with _DRAWING if facts.random else contextlib.nullcontext():
                entry = self._prepare(func, facts, args, kwargs)
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        outputs = tensors_in(out)
        seen = self._map.seen(facts, args, kwargs, reads, outputs)
        if seen.is_op:
            if self.following and not expected:
                self._leave_path(facts.name)
            self._note(seen, entry, outputs, rescued)
        return out

    def _note(
        self,
        seen: Seen,
        entry: _Unfinished | None,
        outputs: Sequence[Tensor],
        rescued: frozenset[int],
    ) -> None:
        """Hold what the plan says."""
        k, self._n_ops = self._n_ops, self._n_ops + 1
        for new, old in seen.in_place:
            self._overwritten(new, old, rescued)
        for number, tensor in seen.writes:
            kept = self.following and number in self.instructions.keep
            forgotten = self.following and number in self.instructions.forget
            if kept or (number in self.handles and not forgotten):
                saved = number in self.instructions.asked and number not in self.handles  # then pack makes the alias
                self._held[number] = _Held(tensor.untyped_storage(), True, None if saved else _alias(tensor))
        if entry is not None and self.following:
            self._entries[k] = entry.finish(seen, outputs)
            self._maker.update((n, k) for n, _ in seen.writes)

    def _overwritten(self, new: int, old: int, rescued: frozenset[int]) -> None:
        """The memory of a value holds another one: that is what its handles stand for (see ``Recorder``)."""
        if old not in rescued:
            self._let_go(old)
        if old in self.handles:
            self.handles[new] = self.handles.pop(old)
            self.waiting[new] = self.waiting.pop(old)
            self._moved[old] = new

    def _rescue(self, written: Sequence[Tensor], expected: bool) -> frozenset[int]:
        """Copy what reruns will read and an op that the plan does not know is about to overwrite."""
        assert self._map is not None
        rescued = set()
        for tensor in written:
            storage = storage_of(tensor)
            number = None if storage is None else self._map.number(storage)
            if number is None:
                continue
            if number < 0:
                self._rescue_outside(number)
            elif number in self._held and not expected and number in self._sources():
                copy = self._held[number].storage().clone()
                self._let_go(number)
                self._held[number] = _Held(copy, original=True)
                rescued.add(number)
        return frozenset(rescued)

    def _rescue_outside(self, number: int) -> None:
        for handle in self._outside.pop(number, ()):
            handle.alias = handle.get().clone(memory_format=torch.preserve_format)
            handle.version = version_of(handle.alias)

    def _expects(self, name: str, reads: Sequence[int] | None = None) -> bool:
        """Whether the plan has this op next."""
        path, k = self.instructions.path, self._n_ops
        return self.following and k < len(path) and _matches(path[k], name, reads)

    def _leave_path(self, name: str) -> None:
        path, k = self.instructions.path, self._n_ops
        if k >= len(path):
            self._deviate(f"operator {k} ({name}) comes after the end of the recorded forward")
        else:
            self._deviate(f"operator {k} is {name}, the recorded forward had {path[k][0]}")

    def _deviate(self, reason: str) -> None:
        self.following = False
        self._on_deviation(reason)

    def _prepare(self, func: Any, facts: OpFacts, args: Any, kwargs: Any) -> _Unfinished:
        """Everything that another run needs, taken before the op runs."""
        if facts.batch_norm:
            args = [None if i in RUNNING_STATISTICS and args[5] else a for i, a in enumerate(args)]
        generator = _generator_of(args, kwargs) if facts.random else None
        assert self._map is not None
        return _Unfinished(
            func,
            _template(tuple(args), self._map, self._outside),
            _template(kwargs, self._map, self._outside),
            generator,
            None if generator is None else _state_of(generator),
            NumericSettings.now(),
        )

    def pack(self, tensor: Tensor) -> Any:
        """A handle for what autograd wants to save."""
        storage = storage_of(tensor)
        number = -1 if storage is None or self._map is None else self._map.number(storage)
        if storage is None or number < 0 or is_parameter(tensor):
            alias = tensor if tensor.is_leaf else tensor.detach()  # a leaf is saved itself: its data may be replaced
            return OutsideHandle(alias, version_of(alias))
        with torch._C._DisableTorchDispatch():
            held, alias = self._held.get(number), tensor.detach()
            if held is None and not (self.following and number in self.instructions.forget):
                held = self._held[number] = _Held(storage, True)
            if held is not None and held.alias is None:
                held.alias = alias  # loses the memory when the tape lets go of the value
            else:
                _take_memory(alias)
            return Handle(self, number, tensor, alias)

    def finish_forward(self) -> None:
        """The forward is over: from now on the tape only answers the backward."""
        if self.following and self._n_ops < len(self.instructions.path):
            self._deviate(f"the forward ended after {self._n_ops} of {len(self.instructions.path)} operators")
        for number, held in self._held.items():
            if held.alias is not None:  # only now: an in-place op counts up the version after we have seen it
                held.version = version_of(held.alias)
            elif self.following and number in self.instructions.keep:
                self._deviate(f"the recorded forward saved value {number} for the backward, this one did not")
        self._map = None
        self._outside.clear()

    # ---- backward ------------------------------------------------------------------------------------------------

    def unpack(self, packed: Any) -> Tensor:
        """The tensor that a handle stands for, computed again if it is gone."""
        if isinstance(packed, OutsideHandle):
            return packed.get()
        with self._lock:  # several threads may go backward through one graph
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
        events = self.instructions.events
        if self.following and self._cursor < len(events) and events[self._cursor].value == number:
            event = events[self._cursor]
            self._cursor += 1
            for rerun in event.reruns:
                self._run_again(rerun.op, rerun)
            tensor = self._saved(packed, self._storage(number))
            if event.drop:
                self._drop(number)
        else:
            if number in self.instructions.forget or number in self.instructions.keep:
                self.following = False  # another order than the plan's: compute on demand from here on
            tensor = self._saved(packed, self._on_demand(number))
        if self._map is not None:  # a backward inside the forward: its operators read this value
            self._map.rebind(tensor.untyped_storage(), number)
        return tensor

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
                self.waiting = dict(self.handles)
                self._installs_left = Counter(self.instructions.installs)
                self._held = {n: h for n, h in self._held.items() if h.original}
            self._task = task
            self._retained = torch._C._autograd._get_current_graph_task_keep_graph()

    def _drop(self, number: int) -> None:
        """Let go of a value, unless a part of the graph that was not recorded still waits for it."""
        held = self._held.get(number)
        if held is None or (self._retained and held.original):
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
            planned = self.instructions.planned - self._late if self.following else self._sources()
            if not self.handles[number] and number not in planned:
                self._let_go(number)

    def _sources(self) -> frozenset[int]:
        """Values that another run may need as long as the plan is not followed."""
        return frozenset(n for e in self._entries.values() for n in e.reads)

    def _look_up(self, number: int) -> torch.UntypedStorage:
        before = dict(self._held)
        try:
            return self._on_demand(number)
        finally:
            self._held = before

    def _on_demand(self, number: int) -> torch.UntypedStorage:
        """Compute a value again from what there is, whatever the plan says; keep what handles still ask for."""
        if number not in self._held:
            needed: set[int] = set()
            pending = [number]
            while pending:
                n = pending.pop()
                if n in self._held:
                    continue
                k = self._maker.get(n)
                if k is None:
                    raise RuntimeError(
                        f"recollect let go of value {n} and cannot compute it again on this path of the backward; "
                        "this is a bug in recollect: run this step without it (recollect.restore) and report it"
                    )
                if k not in needed:
                    needed.add(k)
                    pending.extend(self._entries[k].reads)
            for k in sorted(needed):
                self._run_again(k, None)
            kept = self._sources()
            for n in [n for n, h in self._held.items() if not h.original]:
                if n != number and not self.handles.get(n) and n not in kept:
                    del self._held[n]
        return self._held[number].storage()

    def _run_again(self, k: int, rerun: Rerun | None) -> None:
        """Run op k again. Without a rerun of the plan everything that it makes is held."""
        entry = self._entries[k]
        self._on_rerun()
        memory = {n: self._storage(n) for n in entry.reads}
        for new, old in entry.in_place:
            ends = rerun is not None and old in rerun.drops and not self._is_awaited(old)
            ends = ends and not self._held[old].original
            memory[old] = memory[old] if ends else memory[old].clone()
            memory[new] = memory[old]
        results = self._call(entry, memory)
        made = {n: results[i].untyped_storage() for i, n in entry.outputs} | {n: memory[n] for n, _ in entry.in_place}
        if entry.checksum is not None and entry.checksum != _checksum(made[n] for n in sorted(made)):
            raise _disturbed(entry.func)
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

    def _call(self, entry: _Entry, memory: dict[int, torch.UntypedStorage]) -> list[Tensor]:
        """The op itself, below autograd and autocast, with the random numbers and settings of the forward."""
        self._rerunning, before = True, self._rerunning
        try:
            with (
                _DRAWING if entry.generator is not None else contextlib.nullcontext(),
                torch._C._AutoDispatchBelowAutograd(),
                torch._C._DisableAutocast(),
                entry.settings.applied(),
                _generator_at(entry.generator, entry.generator_state),
            ):
                args, kwargs = _resolved(entry.args, memory), _resolved(entry.kwargs, memory)
                return tensors_in(entry.func(*args, **kwargs))
        finally:
            self._rerunning = before

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The block in which the forward runs."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        with self, hooks:
            yield
            self.finish_forward()


@dataclass(slots=True)
class _Unfinished:
    """An entry before its op has run."""

    func: Any
    args: Any
    kwargs: Any
    generator: torch.Generator | None
    generator_state: bytearray | None
    settings: NumericSettings

    def finish(self, seen: Seen, outputs: Sequence[Tensor]) -> _Entry:
        """The entry, now that it is known what the op made."""
        replaced = {new for new, _ in seen.in_place}
        positions = {id(t): i for i, t in reversed(list(enumerate(outputs)))}
        return _Entry(
            self.func,
            self.args,
            self.kwargs,
            tuple((positions[id(t)], n) for n, t in seen.writes if n not in replaced),
            seen.in_place,
            tuple(n for n in seen.reads if n >= 0),
            self.generator,
            self.generator_state,
            self.settings,
            _checksum(t.untyped_storage() for _, t in seen.writes) if self._may_be_disturbed() else None,
        )

    def _may_be_disturbed(self) -> bool:
        """Whether a thread that knows no tape may have drawn between our look at the generator and the op."""
        generator = self.generator
        return generator is not None and generator.device.type == "cpu" and threading.active_count() > 1


def _matches(step: tuple[str, tuple[int, ...]], name: str, reads: Sequence[int] | None) -> bool:
    """Whether an op is the one that was recorded, by its name and, if they are given, by what it reads.

    In a backward inside the forward, the program also lists what the autograd node holds; those come last.
    """
    if reads is None:
        return step[0] == name
    made = tuple(n for n in reads if n >= 0)
    return step[0] == name and step[1][: len(made)] == made


def _template(tree: Any, values: ValueMap, outside: dict[int, list[OutsideHandle]]) -> Any:
    """Arguments without tensors: made values by number and view, tensors from outside by alias (listed, too)."""
    if isinstance(tree, Tensor):
        storage = storage_of(tree)
        number = -1 if storage is None else values.number(storage)
        if number >= 0:
            return _Made(number, View.of(tree))
        alias = _alias(tree)
        handle = OutsideHandle(alias, version_of(alias))
        if storage is not None:
            outside.setdefault(number, []).append(handle)
        return handle
    if isinstance(tree, (list, tuple)):
        return type(tree)(_template(v, values, outside) for v in tree)
    if isinstance(tree, dict):
        return {k: _template(v, values, outside) for k, v in tree.items()}
    return tree


def _resolved(tree: Any, memory: dict[int, torch.UntypedStorage]) -> Any:
    """The arguments of a template again."""
    if isinstance(tree, _Made):
        return tree.view.on(memory[tree.number])
    if isinstance(tree, OutsideHandle):
        return tree.get()
    if isinstance(tree, (list, tuple)):
        return type(tree)(_resolved(v, memory) for v in tree)
    if isinstance(tree, dict):
        return {k: _resolved(v, memory) for k, v in tree.items()}
    return tree


def _alias(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory that shares the version counter; to be called inside a dispatch mode."""
    key = torch._C.DispatchKey.ADInplaceOrView
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch._C._IncludeDispatchKeyGuard(key):
        return tensor.detach()


def version_of(tensor: Tensor) -> int:
    """The version counter; inference tensors, which have none, never change under autograd."""
    return 0 if tensor.is_inference() else tensor._version


_EMPTY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _take_memory(alias: Tensor) -> None:
    """Leave the alias its version counter, but not the memory."""
    key = alias.dtype, alias.device
    if key not in _EMPTY:
        _EMPTY[key] = torch.empty(0, dtype=alias.dtype, device=alias.device)
    alias.data = _EMPTY[key]


def _whole(storage: torch.UntypedStorage) -> Tensor:
    """A tensor that holds the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _generator_of(args: Any, kwargs: Any) -> torch.Generator:
    """The generator that a random op draws from: given explicitly, or the default one of its device."""
    for a in (*args, *kwargs.values()):
        if isinstance(a, torch.Generator):
            return a
    given = kwargs.get("device")
    first = next(iter(tensors_in((args, kwargs))), None)
    device = torch.device(given) if given is not None else first.device if first is not None else torch.device("cpu")
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return torch.default_generator


@contextlib.contextmanager
def _generator_at(generator: torch.Generator | None, state: bytearray | None) -> Iterator[None]:
    """The generator in an earlier state for the length of the block."""
    if generator is None or state is None:
        yield
        return
    now = _state_of(generator)
    generator.set_state(torch.frombuffer(state, dtype=torch.uint8))
    try:
        yield
    finally:
        generator.set_state(torch.frombuffer(now, dtype=torch.uint8))


def _state_of(generator: torch.Generator) -> bytearray:
    """The state of a generator; not as a tensor, which would take part in the account of memory."""
    return bytearray(generator.get_state().numpy())


def _checksum(memory: Iterable[torch.UntypedStorage]) -> int:
    total = 0
    for storage in memory:
        total = zlib.crc32(_whole(storage).numpy().data, total)
    return total


def _disturbed(func: Any) -> RuntimeError:
    return RuntimeError(
        f"recollect cannot draw the numbers of {func} again: another thread drew from the same generator at the same "
        "moment. Give that thread a torch.Generator of its own, or let the step use one"
    )


def _modified(what: View | Tensor, probe: Tensor, expected: int) -> RuntimeError:
    size = list(what.size) if isinstance(what, View) else list(what.shape)
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{probe.type()} {size}] is at version {probe._version}; expected version {expected} instead. Hint: enable "
        "anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True)."
    )
