"""The shadow of a step: every call repeated on fake tensors.

While the first real step runs, each call is repeated on the *twins* of its arguments, under the recorder and with
gradients, so that a graph of fake tensors grows next to the real one; at the end the backward runs on that graph. None
of the user's code runs, and none of the user's objects is touched: nobody else knows the twins. A twin lives as long as
its tensor does, so the recorder sees when memory is freed.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._python_dispatch import _disable_current_modes

from autoremat.engines.torch.eager.arguments import mapped, requiring_grad, tensors_given, tensors_in, version_of
from autoremat.engines.torch.eager.by_hand import Region, Regions, SetAside
from autoremat.engines.torch.eager.calls import is_pass, name_of
from autoremat.engines.torch.eager.facts import generators_kept, is_overridden, is_torchs, unseen
from autoremat.engines.torch.eager.state import heard_by_classes
from autoremat.engines.torch.operators.facts import OpFacts, facts_of
from autoremat.engines.torch.operators.history import is_leaf, node_made, node_of
from autoremat.engines.torch.operators.local import (
    Description,
    Jagged,
    PackedLocal,
    distributed_like,
    has_inside,
    is_distributed,
    is_jagged,
    knows_ragged_sizes,
    local_of,
)
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.recorder import Recorder, _Packed, _user_line
from autoremat.engines.torch.recording.recording import RecordedOp
from autoremat.program.model import INSIDE
from autoremat.program.once import Once, Reason

_COMPILED = "CompiledFunctionBackward"
"""Name of the node that ``torch.compile`` makes for compiled code.

It comes from ``CompiledFunction`` in ``torch/_functorch/_aot_autograd/runtime_wrappers.py`` (2.13).
"""
_SMALL = 4096
"""At most this many numbers are taken to decide about sizes."""


Blank = Callable[[], Tensor]
"""Makes another fake tensor of some kind."""
Mark = Callable[[Sequence[Any]], None]
"""Lets a recorded op stand for user code given these gradients."""


class Unlike(Exception):
    """A call differs on fake tensors; the step cannot be recorded."""


class Shadow:
    """The twins of a step's tensors, and their recorder.

    Args:
        module_path: the path of the module that runs now.
    """

    def __init__(self, module_path: Callable[[], str]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = _Told(_blank, self._as_fake, module_path)
        self.compiled = ""
        """Where the output of compiled code was met."""
        self.once: dict[int, Reason] = {}
        """For calls that must not be rerun, why."""
        self.seconds: dict[int, float] = {}
        """Seconds of recorded ops that stand for no kernel of torch."""
        self.pack_of: dict[int, int] = {}
        """By the recorder's count of packs, the real step's pack."""
        self.saved: dict[int, int] = {}
        """By real pack, its value's number, if the step made it."""
        self._twins: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._nodes: dict[tuple[int, int], tuple[Tensor, Blank]] = {}
        """Twins by real node; without memory once their tensor is gone."""
        self._node_of: dict[int, tuple[int, int]] = {}
        self._first_node = _next_node()
        self._memory: dict[int, tuple[weakref.ref[torch.UntypedStorage], weakref.ref[Tensor]]] = {}
        """By address of real memory, the twin bound to it last."""
        self._gone: deque[int] = deque()
        self._packs: list[Any] = []
        self._sizes: list[torch.Size] = []
        self._packed_once: set[int] = set()
        """Addresses of storages that the running call has saved."""
        self._saved_after: dict[int, int] = {}
        """For every saved value, the op after which it was saved first."""
        self._loose: list[tuple[int, Tensor]] = []
        self.marks: dict[int, int] = {}
        """Recorded ops that stand for user code, by node's or hook's key."""
        self.met: Callable[[Any], int] | None = None
        """Called with nodes of custom Functions; returns their keys."""
        self.packed_here: dict[int, Tensor] = {}
        """What the running call has saved, by pack."""
        self._regions = Regions()
        self._region: Region | None = None
        """The part that the user checkpoints by hand, if inside one."""
        self._numbers: dict[int, Tensor] = {}
        """Small saved indices with real numbers, by the recorder's pack count."""

    # ---- twins ---------------------------------------------------------------------------------------------------

    def know(self, tensor: Tensor, label: str, kind: str, module: str = "") -> None:
        """Register a tensor that exists before the step."""
        with self._here():
            self.recorder.know(self.twin(tensor, node_of), label, kind, module)

    def know_gradient(self, leaf: Tensor, label: str, module: str) -> None:
        """Register a leaf's existing gradient, to which the backward adds."""
        gradient = self.twin(leaf).grad
        if gradient is not None:
            with self._here():
                self.recorder.know(gradient, label, "gradient", module)

    def forward_ends(self) -> set[int]:
        """Settle the forward; return values that only autocast's cache holds.

        The cache does so until the user's autocast region ends, as a rule before the backward. If another call reads
        such a cast, the call that made the cast can hand it out at its end.
        """
        self.settle()
        recorder = self.recorder
        bound = (storage_of(local_of(twin)) for _, twin in self._twins.values())
        known = {recorder.map.number(s) for s in bound if s is not None}
        last = {op.call: i for i, op in enumerate(recorder.ops) if op.call >= 0}
        maker = {n: op.call for op in recorder.ops for n in op.writes}
        for op in recorder.ops:
            for n in op.reads:
                if n >= 0 and recorder.values[n].available == INSIDE and maker[n] != op.call:
                    recorder.values[n].available = last[maker[n]]
        return {s.number for s in recorder._storages.values() if s.number >= 0 and s.unpacked_at is None} - known

    @property
    def real_bytes(self) -> int:
        """Bytes of real numbers that the recording itself has copied."""
        return sum(numbers.nbytes for numbers in self._numbers.values())

    def leaves(self) -> list[Tensor]:
        """List the twins that gradients are accumulated into."""
        found = {id(twin): twin for _, twin in self._twins.values() if is_leaf(twin) and twin.requires_grad}
        return list(found.values())

    def twin(self, tensor: Tensor, node_of: Callable[[Tensor], Any] = node_made) -> Tensor:
        """Return a tensor's twin, made or corrected if need be.

        ``node_of``: gives the node that has made the tensor.
        """
        if (twin := self._known(tensor)) is not None:
            if _is_like(twin, tensor) and twin.requires_grad == tensor.requires_grad:
                return twin
            return self._put_right(tensor, twin)
        node = node_of(tensor)
        return self._bind(tensor, self._met(tensor, node), node)

    def _as_given(self, tensor: Tensor) -> Tensor:
        """Return the twin of an argument as it was when given."""
        twin = self._known(tensor)
        return self.twin(tensor) if twin is None else twin

    def _known(self, tensor: Tensor) -> Tensor | None:
        """Return the twin that a tensor already has, if any."""
        known = self._twins.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def number(self, tensor: Tensor) -> int:
        """Return the number of the value that a tensor looks at."""
        storage = storage_of(local_of(self.twin(tensor)))
        return -1 if storage is None else self.recorder.map.number(storage)

    def forget(self, tensor: Tensor) -> None:
        """Forget a tensor's twin, which belongs to another value."""
        self._twins.pop(id(tensor), None)

    def revive(self, tensor: Tensor, number: int) -> None:
        """Put a tensor's twin on the memory of a lost value."""
        storage = storage_of(local_of(self.twin(tensor)))
        if storage is not None:
            self.recorder.revive(storage, number)

    def _bind(self, tensor: Tensor, twin: Tensor, node: Any) -> Tensor:
        key, gone = id(tensor), self._gone
        before = self._twins.pop(key, None)
        if before is not None and before[0]() is None:  # another tensor, which is gone, had this address
            self._cut(before[1])
        self._twins[key] = weakref.ref(tensor, lambda _: gone.append(key)), twin
        storage = storage_of(local_of(tensor))
        if storage is not None:
            self._memory[storage._cdata] = weakref.ref(storage), weakref.ref(twin)
        if node is not None:
            where = node._sequence_nr(), tensor.output_nr
            known = self._node_of.get(id(twin))
            if known is not None and known != where:  # it has been overwritten
                self._nodes.pop(known, None)
            self._nodes[where] = twin, _blank_of(twin)
            self._node_of[id(twin)] = where
        return twin

    def settle(self) -> None:
        """Free the memory of twins whose tensors are gone, not their graph."""
        while self._gone:
            known = self._twins.get(key := self._gone.popleft())
            if known is not None and known[0]() is None:
                del self._twins[key]
                self._cut(known[1])

    def _cut(self, twin: Tensor) -> None:
        """Take the memory from a twin; what was computed needs its history."""
        where = self._node_of.pop(id(twin), None)
        if where is None or where not in self._nodes or not (twin.layout is torch.strided or is_jagged(twin)):
            return
        with self._here(), _without_duals():
            tail = _Tail.apply(self, self._nodes[where][1], twin)
            self._nodes[where] = tail, _blank_of(tail)

    def _met(self, tensor: Tensor, node: Any) -> Tensor:
        """Make the twin of a tensor that no call was seen making."""
        with self._here():
            if node is not None and (found := self._of_node(tensor, node)) is not None:
                return found
            if is_jagged(tensor):
                knows_ragged_sizes(self.mode)
                inside = Jagged.of(tensor).converted(self.twin)
                return inside.around(self.twin(local_of(tensor)).detach()).requires_grad_(tensor.requires_grad)
            if is_distributed(tensor):
                return distributed_like(tensor, self._as_fake(local_of(tensor).detach()))
            if _is_nested(tensor):
                blank = self._blank_like(tensor)
                return requiring_grad(blank) if tensor.requires_grad else blank
            detached = local_of(tensor if is_leaf(tensor) else tensor.detach())
            twin: Tensor = self.mode.from_tensor(detached)
            if tensor.requires_grad and not twin.requires_grad:
                twin = requiring_grad(twin)
            return twin

    def _of_node(self, tensor: Tensor, node: Any) -> Tensor | None:
        """Make a twin of a custom function's result, behind its inputs' twins."""
        if type(node).__name__ == _COMPILED:
            self.compiled = self.compiled or _user_line() or "a function"
        found = list(self._behind(node, set()))
        if not found:
            return None
        alias = self._alias_of(tensor)
        return self._stand_in([self._blank_like(tensor) if alias is None else alias], found, node)[0]

    def loose(self, j: int, tensor: Tensor) -> None:
        """Note what is saved outside all calls, as by custom functions."""
        self._loose.append((j, self._memory_of(tensor)))

    def _memory_of(self, tensor: Tensor) -> Tensor:
        """Return a twin of what is being saved, perhaps without a history."""
        known = self._known(tensor)
        if known is not None and _is_like(known, tensor):
            return known
        storage = storage_of(tensor)
        if node_made(tensor) is None or storage is None or has_inside(tensor) or is_distributed(tensor):
            return self.twin(tensor)
        with self._here():
            alias = self._alias_of(tensor)
            twin = self._blank_like(tensor) if alias is None else alias
        if alias is None:
            self._memory[storage._cdata] = weakref.ref(storage), weakref.ref(twin)
        return twin

    def _behind(self, node: Any, seen: set[Any]) -> Iterator[tuple[Tensor, Blank]]:
        """Yield a node's nearest known inputs; unseen nodes may lie between."""
        for n, nr in node.next_functions:
            found = self._input(n, nr)
            if found is not None:
                yield found
            elif n is not None and n not in seen and n._sequence_nr() >= self._first_node:
                seen.add(n)
                yield from self._behind(n, seen)

    def hook(self, key: int, tensor: Tensor) -> bool:
        """Mark a tensor's new hook in the backward; tell if possible."""
        try:
            with self._here():
                twin: Any = self.twin(tensor)
                twin.register_hook(lambda gradient: self._mark(key, "hook", (gradient,)))
        except Exception:  # noqa: BLE001 - whatever a fake tensor cannot do
            return False
        return True

    def _mark(self, key: int, name: str, gradients: Sequence[Any]) -> None:
        """Let an op of the recorded backward stand for user code."""
        recorder = self.recorder
        if not recorder.backward:
            return
        storages = (storage_of(local_of(g)) for g in gradients if isinstance(g, Tensor))
        reads = [n for s in storages if s is not None and (n := recorder.map.number(s)) >= 0]
        self.marks[key] = len(recorder.ops)
        recorder._append(RecordedOp(name, reads, (), (), True, None))

    def graph(self) -> frozenset[tuple[int, int]]:
        """Return the nodes whose twins have a history by now."""
        return frozenset(self._nodes)

    def forget_graph(self, but: frozenset[tuple[int, int]]) -> None:
        """Free histories of newer nodes, from which nobody goes on."""
        self.settle()
        for where in self._nodes.keys() - but:
            twin, _ = self._nodes.pop(where)
            self._node_of.pop(id(twin), None)

    def close(self) -> None:
        """Hold no tensor any more, to break a circle through the graph."""
        for things in (self._twins, self._nodes, self._node_of, self._loose, self._memory, self.packed_here):
            things.clear()
        self._regions, self._region = Regions(), None

    def know_no_gradients(self) -> None:
        """Before a pass, clear twins' gradients where real leaves have none."""
        for reference, twin in list(self._twins.values()):
            tensor = reference()
            if tensor is not None and is_leaf(tensor) and tensor.requires_grad and tensor.grad is None:
                twin.grad = None

    def _input(self, node: Any, nr: int) -> tuple[Tensor, Blank] | None:
        if node is None:
            return None
        if hasattr(node, "variable"):
            twin = self.twin(node.variable)
            return twin, _blank_of(twin)
        return self._nodes.get((node._sequence_nr(), nr))

    def _stand_in(self, results: Sequence[Tensor], inputs: Sequence[tuple[Tensor, Blank]], node: Any) -> list[Tensor]:
        """Give fake results a history: one node, which saves what is loose."""
        saved = [twin for _, twin in self._loose]
        mark = None
        is_custom = isinstance(node, torch.autograd.function.BackwardCFunction) and type(node).__name__ != _COMPILED
        if self.met is not None and is_custom:
            mark = partial(self._mark, self.met(node), type(node).__name__)
        self._packs = []
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with torch.enable_grad(), _without_duals(), hooks:
            made = _StandIn.apply(self, mark, list(results), saved, [b for _, b in inputs], *[t for t, _ in inputs])
        for packed, (j, _) in zip(self._packs, self._loose, strict=True):
            self._match(packed, j)
        self._loose = []
        return list(made)

    def _put_right(self, tensor: Tensor, twin: Tensor) -> Tensor:
        """Correct the twin of a tensor whose shape or history changed unseen."""
        node = node_made(tensor)
        with self._here():
            if not _is_like(twin, tensor):
                return self._bind(tensor, self._met(tensor, node), node)
            if node is None:
                if not is_leaf(twin):
                    twin = twin.detach()
                twin = requiring_grad(twin) if tensor.requires_grad else twin.requires_grad_(False)
                return self._bind(tensor, twin, None)
            if not tensor.requires_grad:
                return self._bind(tensor, twin.detach(), node)
            stand_in = self._of_node(tensor, node)
            if stand_in is None:
                raise Unlike("a tensor got a history that nobody has seen")
            storage, old = storage_of(stand_in), storage_of(twin)
            if storage is not None and old is not None and storage._cdata != old._cdata:  # keep the memory as before
                with self.recorder.paused(), torch.no_grad():
                    stand_in.data = twin.detach()
            return self._bind(tensor, stand_in, node)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        if (twin := _twin_beside(tensor)) is not None:
            return twin
        return tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)

    # ---- calls ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Work among fake tensors, unseen by function modes, recording nothing."""
        with unseen(), self.mode, warnings.catch_warnings(), self.recorder.paused():
            warnings.simplefilter("ignore")
            yield

    @contextmanager
    def _recording(self) -> Iterator[None]:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        with generators_kept(), unseen(), self.mode, warnings.catch_warnings(), self.recorder, hooks:
            warnings.simplefilter("ignore")
            yield

    def _pack(self, tensor: Tensor) -> Any:
        if self._region is not None:
            return self._region.pack(tensor)
        if tensor.dtype is torch.bool:
            self.recorder.count(tensor)
        packed = self.recorder.pack(tensor)
        self._packs.append(packed)
        self._sizes.append(local_of(tensor).size())
        inner = packed.packed if isinstance(packed, PackedLocal) else packed
        storage = storage_of(local_of(tensor))
        if isinstance(inner, _Packed) and storage is not None and storage._cdata not in self._packed_once:
            self._packed_once.add(storage._cdata)
            self._saved_after.setdefault(inner.number, len(self.recorder.ops) - 1)
        return packed

    def _unpack(self, packed: Any) -> Tensor:
        """Hand out memory for a saved tensor, with numbers where needed."""
        if isinstance(packed, SetAside):
            return packed.unpack()
        fake = self.recorder.unpack(packed)
        numbers = self._numbers.get(packed.n) if isinstance(packed, _Packed) else None
        return fake if numbers is None else _with_twin(numbers, fake)

    def make(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, packs: Sequence[int], call: int
    ) -> None:  # fmt: skip
        """Repeat a real call on the twins of its arguments.

        Args:
            func: what was called.
            args: its arguments.
            kwargs: its keyword arguments.
            out: its result.
            packs: the numbers of what autograd has saved inside it.
            call: its position among the calls of the step.
        """
        self.settle()
        recorder, real = self.recorder, tensors_in(out)
        self._region = self._regions.now(recorder)
        recorder.call, recorder.real = call, real
        recorder.given = [(self._as_given(t), t) for t in tensors_given(args, kwargs)]
        counted = [t for _, t in recorder.given if not t.dtype.is_floating_point and not isinstance(t, FakeTensor)]
        recorder.masks = [(t.size(), _count(t)) for t in counted]
        numbers, _ = recorder.map.reads(local_of(twin) for twin, _ in recorder.given)
        if self._region is not None:
            self._region.given(numbers)
        begin = len(recorder.ops)
        versions = {id(twin): _version(twin) for twin, _ in recorder.given}
        made = self._made(func, args, kwargs, real, packs)
        for tensor, twin in zip(real, made, strict=True):
            if versions.get(id(twin)) != _version(twin) or self._known(tensor) is not twin:
                self._bind(tensor, twin, node_made(tensor))
            self._take_size(tensor, twin)
        recorder.real, recorder.given, recorder.masks = [], [], []
        self._read_all(begin, numbers)
        if is_pass(func, name_of(func)):
            self._note_pass(begin)
        else:
            self._note_what_leaves(begin, made)

    def _made(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Sequence[Tensor], packs: Sequence[int]
    ) -> list[Tensor]:  # fmt: skip
        """Return twins of a call's results, from fakes or from real results."""
        begin = len(self.recorder.ops)
        given = [t for _, t in self.recorder.given]
        if is_torchs(func) and not any(_is_opaque(t) or is_overridden(t) for t in (*given, *real)):
            for change in (self._as_given, self._with_numbers):
                try:
                    made = self._on_fakes(func, mapped(args, change), mapped(kwargs, change), real, packs)
                    self.once.pop(self.recorder.call, None)
                    return made
                except Exception as error:  # noqa: BLE001 - whatever a fake kernel does not know
                    del self.recorder.ops[begin:]
                    self.once[self.recorder.call] = Reason(Once.UNRECORDED, f"{type(error).__name__}: {error}")
        return self._foreign(func, mapped(args, self._as_given), mapped(kwargs, self._as_given), real, packs)

    def _on_fakes(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Sequence[Tensor], packs: Sequence[int]
    ) -> list[Tensor]:  # fmt: skip
        """Make a call on fake tensors.

        Raises:
            Unlike: it saves something else there, or gives something of another kind.
        """
        self._packs, self._sizes, self._packed_once = [], [], set()
        with self._recording(), heard_by_classes():
            made = tensors_in(func(*args, **kwargs))
        if len(made) != len(real):
            raise Unlike(f"{_name(func)} gives {len(made)} tensors on fake ones and {len(real)} on real ones")
        for tensor, twin in zip(real, made, strict=True):
            if not _is_like(twin, tensor) or twin.requires_grad != tensor.requires_grad:
                raise Unlike(f"{_name(func)} gives something of another shape, or history, on fake tensors")
        self._match_packs(func, packs)
        return made

    def _with_numbers(self, tensor: Tensor) -> Any:
        """Return the real tensor, or a Python number, where numbers are needed."""
        if not _is_small_index(tensor):
            return self._as_given(tensor)
        return tensor.item() if tensor.dim() == 0 else tensor

    def _read_all(self, begin: int, numbers: Sequence[int]) -> None:
        """Let a call's first op read all arguments, which a rerun needs."""
        if begin < len(self.recorder.ops) and not self.recorder.ops[begin].backward:
            first = self.recorder.ops[begin]
            first.reads += [n for n in numbers if n >= 0 and n not in first.reads]

    def _note_what_leaves(self, begin: int, made: Sequence[Tensor]) -> None:
        """Note when a rerun could hand out what a call made."""
        recorder = self.recorder
        ops = recorder.ops[begin:]
        if any(op.backward for op in ops):
            self._note_pass(begin)
            return
        if len(ops) < 2:
            return
        outputs = {recorder.map.number(s) for t in made if (s := storage_of(local_of(t))) is not None}
        last, born = begin + len(ops) - 1, {n for op in ops for n in op.writes}
        inner = {old for op in ops for _, old in op.in_place if old in born}
        for i, op in enumerate(ops, begin):
            for n in op.writes:
                overwrites = any(new == n and old not in born for new, old in op.in_place)
                if n in self._saved_after and n not in inner:
                    recorder.values[n].available = max(i, self._saved_after[n])
                elif recorder._packs_of.get(n) or ((n in outputs or overwrites) and n not in inner):
                    recorder.values[n].available = last
                else:
                    recorder.values[n].available = INSIDE

    def _note_pass(self, begin: int) -> None:
        """Take an inner pass's ops for no call: its asks stand between."""
        for op in self.recorder.ops[begin:]:
            op.call = -1
            if op.facts is not None:
                op.facts = replace(op.facts, once=Reason(Once.INNER_PASS))

    def _match_packs(self, func: Any, packs: Sequence[int]) -> None:
        """Match what was saved on fake tensors with the real packs.

        Fake tensor subclasses may have their parts saved as well: these are passed over.
        """
        if len(self._packs) == len(packs):
            matched = zip(self._packs, packs, strict=True)
        else:
            rest = iter(zip(self._packs, self._sizes, strict=True))
            sizes = {j: local_of(self.packed_here[j]).size() for j in packs}
            found = [next((p for p, size in rest if size == sizes[j]), None) for j in packs]
            if any(p is None for p in found):
                saved = f"saves {len(self._packs)} tensors on fake ones and {len(packs)} on real ones"
                raise Unlike(f"{_name(func)} {saved}")
            matched = zip(found, packs, strict=True)
        for packed, j in matched:
            self._match(packed, j)

    def _match(self, packed: Any, j: int) -> None:
        if isinstance(packed, PackedLocal):
            packed = packed.packed
        if isinstance(packed, _Packed):
            self.pack_of[packed.n] = j
            self.saved[j] = packed.number
            real = self.packed_here.get(j)
            if real is not None and real.dtype is not torch.bool and _is_small_index(real):
                self._numbers[packed.n] = real.detach().clone()

    def _foreign(self, func: Any, args: Any, kwargs: Any, real: Sequence[Tensor], packs: Sequence[int]) -> list[Tensor]:
        """Let one op and one node stand for a foreign operator."""
        inputs = tensors_in((args, kwargs))
        recorder = self.recorder
        own = {id(t): twin for twin, t in recorder.given}
        with self._here():
            aliases = [own.get(id(t), self._alias_of(t)) for t in real]
            made = [self._blank_like(t) if a is None else a for a, t in zip(aliases, real, strict=True)]
            numbers, _ = recorder.map.reads(inputs)
            recorder._know_outside(inputs)
            facts = replace(facts_of(torch.ops.aten.mul.Tensor), name=_spoken(func))
            op = RecordedOp(_spoken(func), list(numbers), (), (), False, facts, call=recorder.call,
                            module=recorder.module_path(), source=_user_line())  # fmt: skip
            fresh = [t for t, a in zip(made, aliases, strict=True) if a is None]
            seen = [(s, t) for t in fresh if (s := storage_of(t)) is not None]
            writes = [(recorder.map.bind_made(s), t) for s, t in seen]
            op.writes, op.opaque = tuple(n for n, _ in writes), len(seen) < len(fresh)
            recorder._append(op)
            for number, tensor in writes:
                recorder._born(number, tensor, op)
            self._packs = []
            if not any(t.requires_grad for t in real):
                return made
            behind = [(t, _blank_of(t)) for t in inputs if t.requires_grad]
            loose, self._loose = self._loose, [(j, self._twin_of_pack(j)) for j in packs]
            node = next(t.grad_fn for t in real if t.requires_grad)
            made = self._stand_in(made, behind, node)
            self._loose = loose
            return made

    def _alias_of(self, tensor: Tensor) -> Tensor | None:
        """Make a fake tensor on the memory of a twin, if possible."""
        storage = storage_of(tensor if is_distributed(tensor) or is_jagged(tensor) else local_of(tensor))
        real, own = _NONE if storage is None else self._memory.get(storage._cdata, _NONE)
        twin = own()
        if twin is None or real() is not storage or twin.dtype is not tensor.dtype or has_inside(twin):
            return None
        return twin.detach().as_strided(tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _blank_like(self, tensor: Tensor) -> Tensor:
        """Make another fake tensor of the same kind."""
        if is_jagged(tensor):
            return Jagged.of(tensor).converted(self.twin).around(self._blank_like(local_of(tensor)))
        if _is_nested(tensor):
            return torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        if _is_opaque(tensor) or is_distributed(tensor):
            return self.mode.from_tensor(tensor.detach())
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def _twin_of_pack(self, j: int) -> Tensor:
        tensor = self.packed_here[j]
        return self.twin(tensor)

    def _take_size(self, tensor: Tensor, twin: Tensor) -> None:
        """Take the real size: some kernels return an oversized memory."""
        storage, own = storage_of(local_of(tensor)), storage_of(local_of(twin))
        if storage is not None and own is not None:
            number = self.recorder.map.number(own)
            if number >= 0:
                self.recorder.values[number].nbytes = storage.nbytes()


class _StandIn(torch.autograd.Function):
    """One node for all that happens out of sight before a result."""

    @staticmethod
    def forward(
        ctx: Any, shadow: Shadow, mark: Mark | None, results: list[Tensor], saved: Any, blanks: Any, *inputs: Tensor
    ) -> Any:  # fmt: skip
        """Return the results, which have a history now."""
        ctx.shadow, ctx.mark, ctx.blanks = shadow, mark, blanks
        ctx.save_for_backward(*saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Ask for what was saved; give each input a gradient."""
        saved = ctx.saved_tensors
        if ctx.mark is not None:
            ctx.mark(gradients)
        with ctx.shadow.mode:
            made = [blank() for blank in ctx.blanks]
        del saved
        return None, None, None, None, None, *made


@dataclass
class _Told(Recorder):
    """A recorder that knows the real sizes of data-dependent results.

    The real call has just shown them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.real: list[Tensor] = []
        self.given: list[tuple[Tensor, Tensor]] = []
        self.masks: list[tuple[torch.Size, int]] = []
        """Sizes of given masks and indices, with their numbers of nonzero elements."""
        self.counts: dict[int, int] = {}
        """By value, how many elements of a saved mask are true."""

    def count(self, mask: Tensor) -> None:
        """Note how many elements of a saved mask are true."""
        storage = storage_of(mask)
        if storage is None:
            return
        for size, n in self.masks:
            if size == mask.size():
                self.counts[self.map.number(storage)] = n

    def _run(self, func: Any, facts: OpFacts, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1]):
            made = self._sized(func, args)  # the fake kernel of a boolean index asks for numbers in its own way
            if made is not None:
                return made
        try:
            return super()._run(func, facts, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            made = self._sized(func, args)
            if made is None:
                raise
            return made

    def _sized(self, func: Any, args: Any) -> Any:
        """Make a data-dependent operator's results, sized as the real ones."""
        real = self.real
        if func is torch.ops.aten.nonzero.default:
            n = self._n_true(args[0])
            if n is not None:
                return torch.empty_strided((n, args[0].dim()), (1, n), dtype=torch.int64, device=args[0].device)
        if func is torch.ops.aten.index.Tensor and not real:
            return self._indexed(*args)
        returns = func._schema.returns
        if not real or len(returns) != len(real) or any(r.type.kind() != "TensorType" for r in returns):
            return None
        made = tuple(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device) for t in real)
        return made[0] if len(made) == 1 else made

    def _indexed(self, source: Tensor, indices: Any) -> Any:
        """Make what a mask alone picks, in the backward."""
        if len(indices) != 1 or (n := self._n_true(indices[0])) is None:
            return None
        return torch.empty((n, *source.shape[indices[0].dim() :]), dtype=source.dtype, device=source.device)

    def _n_true(self, mask: Tensor) -> int | None:
        for size, n in self.masks:
            if size == mask.size():
                return n
        storage = storage_of(mask)
        known = None if storage is None else self.counts.get(self.map.number(storage))
        return self.real[0].size(0) if known is None and self.real else known


class _Tail(torch.autograd.Function):
    """The history of a tensor without its memory."""

    @staticmethod
    def forward(ctx: Any, shadow: Shadow, blank: Blank, twin: Tensor) -> Any:
        """Return a tensor without elements."""
        ctx.shadow, ctx.blank = shadow, blank
        return torch.empty(0, dtype=twin.dtype, device=twin.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return a gradient of the tensor's size."""
        with ctx.shadow.mode:
            return None, None, ctx.blank()


def _next_node() -> int:
    """Return the number of the next graph node in this thread."""
    with torch.enable_grad():
        node = torch.empty(0, requires_grad=True).view(0).grad_fn
    assert node is not None
    return node._sequence_nr()


def _nothing() -> None:
    return None


_NONE: Any = _nothing, _nothing


def _without_duals() -> AbstractContextManager[Any]:
    """Disable forward-mode derivatives, which stand-in nodes do not have."""
    return _set_fwd_grad_enabled(False)


def _blank_of(tensor: Tensor) -> Blank:
    """Return what makes such a fake tensor, without holding this one."""
    if is_jagged(tensor):
        inside, values = Jagged.of(tensor), _blank_of(local_of(tensor))
        return lambda: inside.around(values())
    if is_distributed(tensor):
        around, local = Description.of(tensor), _blank_of(local_of(tensor))
        return lambda: around.around(local())
    return partial(torch.empty, tensor.size(), dtype=tensor.dtype, device=tensor.device)


def _with_twin(numbers: Tensor, twin: Tensor) -> Tensor:
    """Copy real numbers that stand for a fake tensor.

    The copy keeps the fake tensor alive.
    """
    with _disable_current_modes():
        made = numbers.clone()
    made.twin_beside = twin  # type: ignore[attr-defined]
    return made


def _twin_beside(tensor: Tensor) -> Tensor | None:
    """Return the fake tensor that a real one stands for, if any."""
    return getattr(tensor, "twin_beside", None)


def _blank(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _count(tensor: Tensor) -> int:
    """Count a mask's nonzero elements; the size of anything else."""
    if tensor.dtype is not torch.bool or _is_opaque(tensor) or has_inside(tensor):
        return tensor.numel()
    with unseen():
        return int(tensor.count_nonzero())


def _is_small_index(tensor: Tensor) -> bool:
    """Tell whether numbers decide about sizes, as lengths of sequences do."""
    integer = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return integer and tensor.device.type == "cpu" and tensor.numel() <= _SMALL and not _is_opaque(tensor)


def _is_opaque(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory cannot be seen.

    Sparse, quantized, nested and wrapped tensors are examples.
    """
    return storage_of(local_of(tensor)) is None and not has_inside(tensor)


def _is_nested(tensor: Tensor) -> bool:
    """Tell whether this is a nested tensor of the strided layout.

    A plain one with as many elements stands for it.
    """
    return tensor.is_nested and not is_jagged(tensor)


def _version(twin: Tensor) -> int:
    return version_of(local_of(twin))


def _is_like(twin: Tensor, tensor: Tensor) -> bool:
    """Tell whether two tensors differ in nothing but their numbers."""
    if is_jagged(tensor):
        return is_jagged(twin) and _is_like(local_of(twin), local_of(tensor))
    if _is_nested(tensor):
        return twin.numel() == tensor.numel()
    if twin.size() != tensor.size() or twin.dtype is not tensor.dtype or twin.layout is not tensor.layout:
        return False
    if tensor.layout is not torch.strided or is_distributed(tensor):
        return True
    return twin.stride() == tensor.stride() and twin.storage_offset() == tensor.storage_offset()


def _name(func: Any) -> str:
    return str(getattr(func, "__qualname__", None) or getattr(func, "__name__", func))


def _spoken(func: Any) -> str:
    """Return a torch function's name, as a user would write it."""
    if not (said := str(func)).startswith("<"):
        return said
    module = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", "torch")
    return f"{module}.{name_of(func)}"
