"""The shadow of a step: every call repeated on fake tensors.

While the first real step runs, each call is repeated on the *twins* of its arguments, under the recorder and with
gradients, so that a graph of fake tensors grows next to the real one; at the end the backward runs on that graph. None
of the user's code runs, and none of the user's objects is touched: nobody else knows the twins. A twin lives as long as
its tensor does, so the recorder sees when memory is freed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autoremat.engines.torch.eager.arguments import mapped, tensors_given, tensors_in, version_of
from autoremat.engines.torch.eager.calls import is_pass, name_of
from autoremat.engines.torch.eager.facts import generators_kept, is_overridden, is_torchs, unseen, without_complaints
from autoremat.engines.torch.eager.state import heard_by_classes
from autoremat.engines.torch.eager.twin_graph import TwinGraph
from autoremat.engines.torch.eager.twin_packs import TwinPacks, spoken_name
from autoremat.engines.torch.eager.twin_world import (
    TwinWorld,
    Unlike,
    blank_of,
    count_of,
    is_like,
    is_opaque,
    is_small_index,
)
from autoremat.engines.torch.eager.twins import Twins
from autoremat.engines.torch.operators.facts import facts_of
from autoremat.engines.torch.operators.history import node_made, node_of
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.frames import user_line
from autoremat.engines.torch.recording.recorder import Recorder
from autoremat.engines.torch.recording.recording import RecordedOp
from autoremat.program.model import INSIDE
from autoremat.program.once import Once, Reason


class Shadow:
    """Repeats the calls of a step on twins, under their recorder.

    Args:
        module_path: the path of the module that runs now.

    Attributes:
        mode: of the fake tensors.
        recorder: of the twins.
        packs: what autograd saves of twins.
        twins: by tensor.
        graph: the twins' histories.
        once: for calls that must not be rerun, why.
    """

    def __init__(self, module_path: Callable[[], str]) -> None:
        self._world = world = TwinWorld(module_path)
        self.mode, self.recorder = world.mode, world.recorder
        self.packs, self.twins = TwinPacks(world), Twins(world)
        self.graph = self.twins.graph = TwinGraph(world, self.twins, self.packs)
        self.once: dict[int, Reason] = {}

    # ---- what is known ---------------------------------------------------------------------------------------------

    def know(self, tensor: Tensor, label: str, kind: str, module: str = "") -> None:
        """Register a tensor that exists before the step."""
        with self._world.here():
            self.recorder.log.know(self.twin(tensor, node_of), label, kind, module)

    def know_gradient(self, leaf: Tensor, label: str, module: str) -> None:
        """Register a leaf's existing gradient, to which the backward adds."""
        gradient = self.twin(leaf).grad
        if gradient is not None:
            with self._world.here():
                self.recorder.log.know(gradient, label, "gradient", module)

    def twin(self, tensor: Tensor, node_of: Callable[[Tensor], Any] = node_made) -> Tensor:
        """Return a tensor's twin, made or corrected if need be."""
        return self.twins.of(tensor, node_of)

    def forward_ends(self) -> set[int]:
        """Settle the forward; return values that only autocast's cache holds.

        The cache does so until the user's autocast region ends, as a rule before the backward. Where another call reads
        a cast that the call which made it has not saved, no rerun could hand it out: that call must not run again.
        """
        self.twins.settle()
        recorder = self.recorder
        known = self.twins.numbers()
        last = {op.call: i for i, op in enumerate(recorder.ops) if op.call >= 0}
        maker = {n: op for op in recorder.ops for n in op.writes}
        for op in recorder.ops:
            for n in op.reads:
                if n >= 0 and recorder.values[n].available == INSIDE and maker[n].call != op.call:
                    recorder.values[n].available = last[maker[n].call]
                    if (facts := maker[n].facts) is not None:
                        maker[n].facts = replace(facts, once=Reason(Once.NOT_THERE))
        return {n for n in recorder.storages.living() if n >= 0} - known

    def number(self, tensor: Tensor) -> int:
        """Return the number of the value that a tensor looks at."""
        storage = storage_of(local_of(self.twin(tensor)))
        return -1 if storage is None else self.recorder.map.number(storage)

    def revive(self, tensor: Tensor, number: int) -> None:
        """Put a tensor's twin on the memory of a lost value."""
        storage = storage_of(local_of(self.twin(tensor)))
        if storage is not None:
            self.recorder.storages.revive(storage, number)

    def forget_graph(self, but: frozenset[tuple[int, int]]) -> None:
        """Free histories of newer nodes, from which nobody goes on."""
        self.twins.settle()
        self.graph.forget(but)

    def close(self) -> None:
        """Hold no tensor any more, to break a circle through the graph."""
        for part in (self.twins, self.graph, self.packs):
            part.close()

    # ---- calls ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _recording(self) -> Iterator[None]:
        with generators_kept(), unseen(), self.mode, warnings.catch_warnings(), self.recorder, self.packs.hooks():
            warnings.simplefilter("ignore")
            yield

    def make(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, packs: Sequence[int], call: int,
        *, foreign: bool = False,
    ) -> None:  # fmt: skip
        """Repeat a real call on the twins of its arguments.

        Args:
            func: what was called.
            args: its arguments.
            kwargs: its keyword arguments.
            out: its result.
            packs: the numbers of what autograd has saved inside it.
            call: its position among the calls of the step.
            foreign: fake tensors cannot make it, but what it does is known.
        """
        self.twins.settle()
        recorder, real = self.recorder, tensors_in(out)
        region = self.packs.find_region()
        recorder.call, recorder.real = call, real
        recorder.given = [(self.twins.as_given(t), t) for t in tensors_given(args, kwargs)]
        counted = [t for _, t in recorder.given if not t.dtype.is_floating_point and not isinstance(t, FakeTensor)]
        recorder.masks = [(t.size(), count_of(t)) for t in counted]
        numbers, _ = recorder.map.reads(local_of(twin) for twin, _ in recorder.given)
        if region is not None:
            region.given(numbers)
        begin = len(recorder.ops)
        versions = {id(twin): _version(twin) for twin, _ in recorder.given}
        made = self._made(func, args, kwargs, real, packs, foreign=foreign)
        for tensor, twin in zip(real, made, strict=True):
            if versions.get(id(twin)) != _version(twin) or self.twins.known(tensor) is not twin:
                self.twins.bind(tensor, twin, node_made(tensor))
            _take_size(recorder, tensor, twin)
        recorder.real, recorder.given, recorder.masks = [], [], []
        _read_all(recorder, begin, numbers)
        if is_pass(func, name_of(func)):
            _note_pass(recorder, begin)
        else:
            _note_what_leaves(recorder, self.packs.saved_after, begin, made)

    def _made(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Sequence[Tensor], packs: Sequence[int],
        *, foreign: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Return twins of a call's results, from fakes or from real results."""
        begin = len(self.recorder.ops)
        given = [t for _, t in self.recorder.given]
        if not foreign and is_torchs(func) and not any(is_opaque(t) or is_overridden(t) for t in (*given, *real)):
            for change in (self.twins.as_given, self._with_numbers):
                try:
                    made = self._on_fakes(func, mapped(args, change), mapped(kwargs, change), real, packs)
                    self.once.pop(self.recorder.call, None)
                    return made
                except Exception as error:  # noqa: BLE001 - whatever a fake kernel does not know
                    del self.recorder.ops[begin:]
                    self.once[self.recorder.call] = Reason(Once.UNRECORDED, f"{type(error).__name__}: {error}")
        return self._foreign(func, mapped(args, self.twins.as_given), mapped(kwargs, self.twins.as_given), real, packs)

    def _on_fakes(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], real: Sequence[Tensor], packs: Sequence[int]
    ) -> list[Tensor]:  # fmt: skip
        """Make a call on fake tensors.

        Raises:
            Unlike: it saves something else there, or gives something of another kind.
        """
        self.packs.begin()
        with self._recording(), heard_by_classes(), without_complaints():
            made = tensors_in(func(*args, **kwargs))
        if len(made) != len(real):
            raise Unlike(f"{spoken_name(func)} gives {len(made)} tensors on fake ones and {len(real)} on real ones")
        is_inference = torch.is_inference_mode_enabled()  # there, some views say that they require grad
        for tensor, twin in zip(real, made, strict=True):
            is_other = twin.requires_grad != tensor.requires_grad and not (is_inference and tensor._is_view())
            if is_other or not is_like(twin, tensor) or not _looks_alike(twin, tensor, self.recorder.given):
                raise Unlike(f"{spoken_name(func)} gives something of another shape, or history, on fake tensors")
        self.packs.match_all(func, packs)
        return made

    def _with_numbers(self, tensor: Tensor) -> Any:
        """Return the real tensor, or a Python number, where numbers are needed."""
        if not is_small_index(tensor):
            return self.twins.as_given(tensor)
        return tensor.item() if tensor.dim() == 0 else tensor

    def _foreign(self, func: Any, args: Any, kwargs: Any, real: Sequence[Tensor], packs: Sequence[int]) -> list[Tensor]:
        """Let one op and one node stand for a foreign operator."""
        inputs = tensors_in((args, kwargs))
        recorder = self.recorder
        own = {id(t): twin for twin, t in recorder.given}
        with self._world.here():
            aliases = [own.get(id(t), self.twins.alias_of(t)) for t in real]
            made = [self.twins.blank_like(t) if a is None else a for a, t in zip(aliases, real, strict=True)]
            numbers, _ = recorder.map.reads(inputs)
            recorder.log.know_outside(inputs)
            facts = replace(facts_of(torch.ops.aten.mul.Tensor), name=_spoken(func))
            op = RecordedOp(_spoken(func), list(numbers), (), (), False, facts, call=recorder.call,
                            module=recorder.module_path(), source=user_line())  # fmt: skip
            fresh = [t for t, a in zip(made, aliases, strict=True) if a is None]
            seen = [(s, t) for t in fresh if (s := storage_of(t)) is not None]
            writes = [(recorder.map.bind_made(s), t) for s, t in seen]
            op.writes, op.opaque = tuple(n for n, _ in writes), len(seen) < len(fresh)
            recorder.log.append(op)
            for number, tensor in writes:
                recorder.storages.born(number, tensor, op)
            self.packs.begin()
            node = next((node for t in real if (node := node_made(t)) is not None), None)
            if node is None:  # also of a view made in inference mode, which says that it requires grad
                return made
            behind = [(t, blank_of(t)) for t in inputs if t.requires_grad]
            saved = [(j, self.twin(self.packs.here[j])) for j in packs]
            return self.graph.stand_in(made, behind, node, saved)


def _looks_alike(twin: Tensor, tensor: Tensor, given: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Tell whether both look at memory of what was given, or neither."""
    own, real = storage_of(local_of(twin)), storage_of(local_of(tensor))
    if own is None or real is None or not tensor.numel():
        return True
    shares = own._cdata in _addresses(a for a, _ in given), real._cdata in _addresses(b for _, b in given)
    return shares[0] == shares[1]


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {s._cdata for t in tensors if (s := storage_of(local_of(t))) is not None}


def _take_size(recorder: Recorder, tensor: Tensor, twin: Tensor) -> None:
    """Take the real size: some kernels return an oversized memory."""
    storage, own = storage_of(local_of(tensor)), storage_of(local_of(twin))
    if storage is not None and own is not None:
        number = recorder.map.number(own)
        if number >= 0:
            recorder.values[number].nbytes = storage.nbytes()


def _read_all(recorder: Recorder, begin: int, numbers: Sequence[int]) -> None:
    """Let a call's first op read all arguments, which a rerun needs."""
    if begin < len(recorder.ops) and not recorder.ops[begin].backward:
        first = recorder.ops[begin]
        first.reads += [n for n in numbers if n >= 0 and n not in first.reads]


def _note_what_leaves(recorder: Recorder, saved_after: Mapping[int, int], begin: int, made: Sequence[Tensor]) -> None:
    """Note when a rerun could hand out what a call made."""
    ops = recorder.ops[begin:]
    if any(op.backward for op in ops):
        _note_pass(recorder, begin)
        return
    if len(ops) < 2:
        return
    outputs = {recorder.map.number(s) for t in made if (s := storage_of(local_of(t))) is not None}
    last, born = begin + len(ops) - 1, {n for op in ops for n in op.writes}
    inner = {old for op in ops for _, old in op.in_place if old in born}
    for i, op in enumerate(ops, begin):
        for n in op.writes:
            overwrites = any(new == n and old not in born for new, old in op.in_place)
            if n in saved_after and n not in inner:
                recorder.values[n].available = max(i, saved_after[n])
            elif recorder.packs.is_saved(n) or ((n in outputs or overwrites) and n not in inner):
                recorder.values[n].available = last
            else:
                recorder.values[n].available = INSIDE


def _note_pass(recorder: Recorder, begin: int) -> None:
    """Take an inner pass's ops for no call: its asks stand between."""
    for op in recorder.ops[begin:]:
        op.call = -1
        if op.facts is not None:
            op.facts = replace(op.facts, once=Reason(Once.INNER_PASS))


def _version(twin: Tensor) -> int:
    return version_of(local_of(twin))


def _spoken(func: Any) -> str:
    """Return a torch function's name, as a user would write it."""
    if not (said := str(func)).startswith("<"):
        return said
    module = getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", "torch")
    return f"{module}.{name_of(func)}"
