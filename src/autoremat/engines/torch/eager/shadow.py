"""The shadow of a step: every call of its forward made once more, on fake tensors, under the recorder.

While the first real step runs, each call is made again on the *twins* of its arguments, with gradients, so that a graph
of fake tensors grows beside the real one; at the end the backward runs on that. No code of the user's runs, and nothing
of the user's is touched: twins are known to nobody else. A twin lives as long as its tensor does, so the recorder sees
when memory is let go of.
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
"""What the compiler calls the node of what it has compiled."""
_SMALL = 4096
"""So many numbers at most decide about sizes."""


Blank = Callable[[], Tensor]
"""Makes another fake tensor of some kind."""
Mark = Callable[[Sequence[Any]], None]
"""Lets an op of the recording stand for code of the user's that is given these gradients."""


class Unlike(Exception):
    """A call does on fake tensors something else than on real ones, so that the step cannot be recorded."""


class Shadow:
    """Twins of a step's tensors, and the recorder that looks on.

    Args:
        module_path: the path of the module that runs now.
    """

    def __init__(self, module_path: Callable[[], str]) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.recorder = _Told(_blank, self._as_fake, module_path)
        self.compiled = ""
        """Where something was met that compiled code has made."""
        self.once: dict[int, Reason] = {}
        """For calls that must not be made again, why."""
        self.seconds: dict[int, float] = {}
        """For recorded ops that no kernel of torch's stands for, how long they took."""
        self.pack_of: dict[int, int] = {}
        """For every tensor that the recorder packs, counted from 0, the pack of the real step."""
        self.saved: dict[int, int] = {}
        """For every pack of the real step the number of its value, if it was made in the step."""
        self._twins: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._nodes: dict[tuple[int, int], tuple[Tensor, Blank]] = {}
        """Twins by the node of the real graph that made them; one whose tensor is gone has no memory any more."""
        self._node_of: dict[int, tuple[int, int]] = {}
        self._first_node = _next_node()
        self._memory: dict[int, tuple[weakref.ref[torch.UntypedStorage], weakref.ref[Tensor]]] = {}
        """For the memory of a real tensor, by address, the twin that has been bound to it last."""
        self._gone: deque[int] = deque()
        self._packs: list[Any] = []
        self._sizes: list[torch.Size] = []
        self._packed_once: set[int] = set()
        """Storages that the call that runs now has saved, by address."""
        self._saved_after: dict[int, int] = {}
        """For every value that is saved the op after which that happened first."""
        self._loose: list[tuple[int, Tensor]] = []
        self.marks: dict[int, int] = {}
        """For nodes and hooks that are code of the user's, by key, the recorded op that stands for them."""
        self.met: Callable[[Any], int] | None = None
        """Called with the nodes of custom Functions; gives their keys."""
        self.packed_here: dict[int, Tensor] = {}
        """What the call that runs now has saved, by pack."""
        self._regions = Regions()
        self._region: Region | None = None
        """Where the call that runs now is, if the user checkpoints it himself."""
        self._numbers: dict[int, Tensor] = {}
        """Small indices that autograd has saved, with their numbers, by the recorder's count of packs."""

    # ---- twins ---------------------------------------------------------------------------------------------------

    def know(self, tensor: Tensor, label: str, kind: str, module: str = "") -> None:
        """Register a tensor that exists before the step."""
        with self._here():
            self.recorder.know(self.twin(tensor, node_of), label, kind, module)

    def know_gradient(self, leaf: Tensor, label: str, module: str) -> None:
        """Register the gradient that a leaf has already: the backward adds to it."""
        gradient = self.twin(leaf).grad
        if gradient is not None:
            with self._here():
                self.recorder.know(gradient, label, "gradient", module)

    def forward_ends(self) -> set[int]:
        """Settle what the forward has left; the values that only autocast's cache still holds.

        It does so until the user's region ends, which is before the backward as a rule. What such a cast is read by in
        another call can be handed out at the end of the one that made it.
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
        """What the recording itself holds in memory: copies of numbers that the backward looks at."""
        return sum(numbers.nbytes for numbers in self._numbers.values())

    def leaves(self) -> list[Tensor]:
        """The twins that gradients are accumulated into."""
        found = {id(twin): twin for _, twin in self._twins.values() if is_leaf(twin) and twin.requires_grad}
        return list(found.values())

    def twin(self, tensor: Tensor, node_of: Callable[[Tensor], Any] = node_made) -> Tensor:
        """The twin of a tensor, made where there is none, put right where the tensor has changed unseen.

        ``node_of``: gives the node that has made the tensor.
        """
        if (twin := self._known(tensor)) is not None:
            if _is_like(twin, tensor) and twin.requires_grad == tensor.requires_grad:
                return twin
            return self._put_right(tensor, twin)
        node = node_of(tensor)
        return self._bind(tensor, self._met(tensor, node), node)

    def _as_given(self, tensor: Tensor) -> Tensor:
        """The twin of what a call was given, as it was then: the tensor itself may have been overwritten since."""
        twin = self._known(tensor)
        return self.twin(tensor) if twin is None else twin

    def _known(self, tensor: Tensor) -> Tensor | None:
        """The twin that a tensor has already."""
        known = self._twins.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def number(self, tensor: Tensor) -> int:
        """The number of the value that a tensor looks at."""
        storage = storage_of(local_of(self.twin(tensor)))
        return -1 if storage is None else self.recorder.map.number(storage)

    def forget(self, tensor: Tensor) -> None:
        """The twin of a tensor is that of something else: the next one is made anew."""
        self._twins.pop(id(tensor), None)

    def revive(self, tensor: Tensor, number: int) -> None:
        """Let the twin of a tensor be on the memory of a value of which nobody was known to look at it any more."""
        storage = storage_of(local_of(self.twin(tensor)))
        if storage is not None:
            self.recorder.revive(storage, number)

    def _bind(self, tensor: Tensor, twin: Tensor, node: Any) -> Tensor:
        key, gone = id(tensor), self._gone
        before = self._twins.pop(key, None)
        if before is not None and before[0]() is None:  # this tensor is where another one was that is gone by now
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
        """Let twins go whose tensors are gone: their memory, not the graph that they are part of."""
        while self._gone:
            known = self._twins.get(key := self._gone.popleft())
            if known is not None and known[0]() is None:
                del self._twins[key]
                self._cut(known[1])

    def _cut(self, twin: Tensor) -> None:
        """Take the memory away from a twin whose tensor is gone; what has been computed from it needs its history."""
        where = self._node_of.pop(id(twin), None)
        if where is None or where not in self._nodes or not (twin.layout is torch.strided or is_jagged(twin)):
            return
        with self._here(), _without_duals():
            tail = _Tail.apply(self, self._nodes[where][1], twin)
            self._nodes[where] = tail, _blank_of(tail)

    def _met(self, tensor: Tensor, node: Any) -> Tensor:
        """The twin of a tensor that no call was seen to make: from outside, or made out of sight from what is known."""
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
        """The twin of a tensor with a history: a node of a custom function, with the twins of its inputs before it."""
        if type(node).__name__ == _COMPILED:
            self.compiled = self.compiled or _user_line() or "a function"
        found = list(self._behind(node, set()))
        if not found:
            return None
        alias = self._alias_of(tensor)
        return self._stand_in([self._blank_like(tensor) if alias is None else alias], found, node)[0]

    def loose(self, j: int, tensor: Tensor) -> None:
        """Note what is saved outside of all calls: by a custom function, or by what runs out of sight."""
        self._loose.append((j, self._memory_of(tensor)))

    def _memory_of(self, tensor: Tensor) -> Tensor:
        """The twin of what is being saved, or one without a history: the node that saves it is the history's end."""
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
        """The nearest known inputs of a node; between them and it there may be more that nobody was seen to make."""
        for n, nr in node.next_functions:
            found = self._input(n, nr)
            if found is not None:
                yield found
            elif n is not None and n not in seen and n._sequence_nr() >= self._first_node:
                seen.add(n)
                yield from self._behind(n, seen)

    def hook(self, key: int, tensor: Tensor) -> bool:
        """Mark where the backward comes to a hook that is about to be registered on a tensor; whether that can be."""
        try:
            with self._here():
                twin: Any = self.twin(tensor)
                twin.register_hook(lambda gradient: self._mark(key, "hook", (gradient,)))
        except Exception:  # noqa: BLE001 - whatever a fake tensor cannot do
            return False
        return True

    def _mark(self, key: int, name: str, gradients: Sequence[Any]) -> None:
        """Let an op of the recorded backward stand for code of the user's."""
        recorder = self.recorder
        if not recorder.backward:
            return
        storages = (storage_of(local_of(g)) for g in gradients if isinstance(g, Tensor))
        reads = [n for s in storages if s is not None and (n := recorder.map.number(s)) >= 0]
        self.marks[key] = len(recorder.ops)
        recorder._append(RecordedOp(name, reads, (), (), True, None))

    def graph(self) -> frozenset[tuple[int, int]]:
        """The nodes whose twins have a history by now."""
        return frozenset(self._nodes)

    def forget_graph(self, but: frozenset[tuple[int, int]]) -> None:
        """Nobody goes on from nodes that have come since: their histories may go with the tensors."""
        self.settle()
        for where in self._nodes.keys() - but:
            twin, _ = self._nodes.pop(where)
            self._node_of.pop(id(twin), None)

    def close(self) -> None:
        """Hold no tensor any more: a graph may refer to this, and what is held here to that graph."""
        for things in (self._twins, self._nodes, self._node_of, self._loose, self._memory, self.packed_here):
            things.clear()
        self._regions, self._region = Regions(), None

    def know_no_gradients(self) -> None:
        """Before a pass: leaves that have no gradient have none here either."""
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
        """Give fake results a history: one node behind these inputs, which has saved what is loose."""
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
        """The twin of a tensor that has got another shape, or another history, out of sight."""
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
            if storage is not None and old is not None and storage._cdata != old._cdata:  # the same memory as before
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
        """Among fake tensors, unseen by function modes, nothing recorded."""
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
        """Hand out memory for a saved tensor; with numbers, where the backward may look at them."""
        if isinstance(packed, SetAside):
            return packed.unpack()
        fake = self.recorder.unpack(packed)
        numbers = self._numbers.get(packed.n) if isinstance(packed, _Packed) else None
        return fake if numbers is None else _with_twin(numbers, fake)

    def make(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, packs: Sequence[int], call: int
    ) -> None:  # fmt: skip
        """Make a call on twins that has just been made on real tensors.

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
        """The twins of what a call gives: by making it, or, where that cannot be done on fakes, by what it gave."""
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
        """A tensor of which the call needs the numbers: real, or a number of Python where it is just one."""
        if not _is_small_index(tensor):
            return self._as_given(tensor)
        return tensor.item() if tensor.dim() == 0 else tensor

    def _read_all(self, begin: int, numbers: Sequence[int]) -> None:
        """Let the first op of a call read all that the call is given: another run needs all of its arguments."""
        if begin < len(self.recorder.ops) and not self.recorder.ops[begin].backward:
            first = self.recorder.ops[begin]
            first.reads += [n for n in numbers if n >= 0 and n not in first.reads]

    def _note_what_leaves(self, begin: int, made: Sequence[Tensor]) -> None:
        """Note when another run of the call could hand out what it has made, where it is made up of several ops."""
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
        """Take the ops of a pass of its own for no call: what the pass asks for stands between them."""
        for op in self.recorder.ops[begin:]:
            op.call = -1
            if op.facts is not None:
                op.facts = replace(op.facts, once=Reason(Once.INNER_PASS))

    def _match_packs(self, func: Any, packs: Sequence[int]) -> None:
        """Find out which of what was saved on fake tensors is what on real ones.

        Subclasses of tensors may have their parts saved as well when they are fake: these are passed over.
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
        """What an operator that is not torch's gives: one op of the program, and one node; nobody's code runs."""
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
        """A fake tensor on the memory of a twin whose tensor is on the memory of this one, if there is such a twin."""
        storage = storage_of(tensor if is_distributed(tensor) or is_jagged(tensor) else local_of(tensor))
        real, own = _NONE if storage is None else self._memory.get(storage._cdata, _NONE)
        twin = own()
        if twin is None or real() is not storage or twin.dtype is not tensor.dtype or has_inside(twin):
            return None
        return twin.detach().as_strided(tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _blank_like(self, tensor: Tensor) -> Tensor:
        """Another fake tensor of the same kind."""
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
        """Some kernels leave their result in memory that was meant for more."""
        storage, own = storage_of(local_of(tensor)), storage_of(local_of(twin))
        if storage is not None and own is not None:
            number = self.recorder.map.number(own)
            if number >= 0:
                self.recorder.values[number].nbytes = storage.nbytes()


class _StandIn(torch.autograd.Function):
    """One node for all that happens out of sight between some tensors and a result."""

    @staticmethod
    def forward(
        ctx: Any, shadow: Shadow, mark: Mark | None, results: list[Tensor], saved: Any, blanks: Any, *inputs: Tensor
    ) -> Any:  # fmt: skip
        """The results; they have a history now."""
        ctx.shadow, ctx.mark, ctx.blanks = shadow, mark, blanks
        ctx.save_for_backward(*saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Ask for what was saved, and give each input a gradient of its size."""
        saved = ctx.saved_tensors
        if ctx.mark is not None:
            ctx.mark(gradients)
        with ctx.shadow.mode:
            made = [blank() for blank in ctx.blanks]
        del saved
        return None, None, None, None, None, *made


@dataclass
class _Told(Recorder):
    """A recorder that is told the size of what depends on numbers: the real call has just shown it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.real: list[Tensor] = []
        self.given: list[tuple[Tensor, Tensor]] = []
        self.masks: list[tuple[torch.Size, int]] = []
        """Sizes of the masks and indices that the call is given, and how many of their elements are not zero."""
        self.counts: dict[int, int] = {}
        """For values that are masks and are saved, how many elements are true."""

    def count(self, mask: Tensor) -> None:
        """Note how many elements of a mask are true that autograd saves."""
        storage = storage_of(mask)
        if storage is None:
            return
        for size, n in self.masks:
            if size == mask.size():
                self.counts[self.map.number(storage)] = n

    def _run(self, func: Any, facts: OpFacts, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1]):
            made = self._sized(func, args)  # a fake kernel would look for the numbers in its own way
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
        """Results of an operator whose size depends on numbers, by those of the call that it is in."""
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
        """What a mask alone picks, in the backward."""
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
        """A tensor without elements."""
        ctx.shadow, ctx.blank = shadow, blank
        return torch.empty(0, dtype=twin.dtype, device=twin.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """A gradient of the tensor's size."""
        with ctx.shadow.mode:
            return None, None, ctx.blank()


def _next_node() -> int:
    """The number of the next node of a graph; this thread counts them."""
    with torch.enable_grad():
        node = torch.empty(0, requires_grad=True).view(0).grad_fn
    assert node is not None
    return node._sequence_nr()


def _nothing() -> None:
    return None


_NONE: Any = _nothing, _nothing


def _without_duals() -> AbstractContextManager[Any]:
    """No forward-mode derivatives in this block: the nodes that stand in for others have none."""
    return _set_fwd_grad_enabled(False)


def _blank_of(tensor: Tensor) -> Blank:
    """What makes another fake tensor of the same kind, without holding this one."""
    if is_jagged(tensor):
        inside, values = Jagged.of(tensor), _blank_of(local_of(tensor))
        return lambda: inside.around(values())
    if is_distributed(tensor):
        around, local = Description.of(tensor), _blank_of(local_of(tensor))
        return lambda: around.around(local())
    return partial(torch.empty, tensor.size(), dtype=tensor.dtype, device=tensor.device)


def _with_twin(numbers: Tensor, twin: Tensor) -> Tensor:
    """A copy of real numbers that stands for a fake tensor, which lives as long as it does."""
    with _disable_current_modes():
        made = numbers.clone()
    made.twin_beside = twin  # type: ignore[attr-defined]
    return made


def _twin_beside(tensor: Tensor) -> Tensor | None:
    """The fake tensor that a real one stands for, if it does."""
    return getattr(tensor, "twin_beside", None)


def _blank(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _count(tensor: Tensor) -> int:
    """How many elements of a mask are not zero; of what is no mask, its size."""
    if tensor.dtype is not torch.bool or _is_opaque(tensor) or has_inside(tensor):
        return tensor.numel()
    with unseen():
        return int(tensor.count_nonzero())


def _is_small_index(tensor: Tensor) -> bool:
    """Whether this is something like the lengths of sequences: numbers that decide about sizes."""
    integer = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return integer and tensor.device.type == "cpu" and tensor.numel() <= _SMALL and not _is_opaque(tensor)


def _is_opaque(tensor: Tensor) -> bool:
    """Whether the memory of a tensor cannot be seen: sparse, quantized, nested or wrapped ones."""
    return storage_of(local_of(tensor)) is None and not has_inside(tensor)


def _is_nested(tensor: Tensor) -> bool:
    """Whether this is a nested tensor of the old layout, for which another one stands that has as many elements."""
    return tensor.is_nested and not is_jagged(tensor)


def _version(twin: Tensor) -> int:
    return version_of(local_of(twin))


def _is_like(twin: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors differ in nothing but their numbers."""
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
    """What a function of torch's API is called, as a user would write it."""
    if not (said := str(func)).startswith("<"):
        return said
    module = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", "torch")
    return f"{module}.{name_of(func)}"
