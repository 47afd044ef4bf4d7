"""An op of the forward, ready to run again: its arguments without tensors, its random numbers, its settings."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoremat.record.as_plain import Autocast, run_op
from autoremat.record.facts import RUNNING_STATISTICS, TRAINING, OpFacts, facts_of, tensors_in
from autoremat.record.values import Seen, ValueMap, View, fingerprint, storage_of
from autoremat.run.settings import NumericSettings, set_state, state_of

DRAWING = threading.RLock()
"""Held while a generator's state is taken and used, or changed for a while: other threads may draw from it too."""


class OutsideHandle:
    """Stands for a saved tensor that the forward did not make (a parameter, an input): itself or an alias of it."""

    __slots__ = ("alias", "version")

    def __init__(self, alias: Tensor, version: int) -> None:
        self.alias, self.version = alias, version

    def get(self) -> Tensor:
        """The tensor; raises what autograd would raise if it has been modified in place since."""
        if version_of(self.alias) != self.version:
            raise modified(self.alias, self.alias, self.version)
        return self.alias


class _Made(NamedTuple):
    """An argument that looks at a value of the forward."""

    number: int
    view: View


class _Nest(NamedTuple):
    """A list, tuple or dict among the arguments that has tensors in it: what makes it, and its content."""

    make: Callable[[list[Any]], Any]
    content: list[Any]


class Replay:
    """The block in which ops run again: below autograd and autocast; the numeric settings are put back at its end."""

    __slots__ = ("_before", "_cache", "_guards", "_settings")

    def __enter__(self) -> Replay:
        self._before = self._settings = NumericSettings.now()
        self._guards = torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast()
        for guard in self._guards:
            guard.__enter__()
        self._cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it is for the forward's casts
        return self

    def __exit__(self, *error: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*error)
        torch.set_autocast_cache_enabled(self._cache)
        self._settings.switch_to(self._before)

    def use(self, settings: NumericSettings) -> None:
        """Switch to the numeric settings of an op."""
        if settings is not self._settings:
            self._settings.switch_to(settings)
            self._settings = settings


@dataclass(slots=True)
class Entry:
    """An op of the forward, ready to run again. Not frozen: one is made for every such op of every forward."""

    func: torch._ops.OpOverload
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: tuple[tuple[int, int], ...]
    """Pairs (position among the tensors of the result, value)."""
    in_place: tuple[tuple[int, int], ...]
    reads: tuple[int, ...]
    generator: torch.Generator | None
    generator_state: bytearray | None
    settings: NumericSettings
    checksum: int | None
    """Of what a random op drew, where other threads might have drawn in between."""

    def run(self, memory: dict[int, torch.UntypedStorage], replay: Replay) -> dict[int, torch.UntypedStorage]:
        """Run the op again, with the random numbers and settings of the forward.

        Args:
            memory: of the values that it reads; of those that it makes in place, too.
            replay: the block in which this happens.

        Returns:
            The memory of every value that it makes.
        """
        replay.use(self.settings)
        if self.generator is None or self.generator_state is None:
            results = self._results(memory)
        else:
            with DRAWING, _generator_at(self.generator, self.generator_state):
                results = self._results(memory)
        made = {n: results[i].untyped_storage() for i, n in self.outputs}
        for n, _ in self.in_place:
            made[n] = memory[n]
        if self.checksum is not None and self.checksum != checksum(made[n] for n in sorted(made)):
            raise _disturbed(self.func)
        return made

    def _results(self, memory: dict[int, torch.UntypedStorage]) -> list[Tensor]:
        args = [_resolved(a, memory) for a in self.args]
        kwargs = {k: _resolved(a, memory) for k, a in self.kwargs.items()} if self.kwargs else self.kwargs
        return tensors_in(run_op(self.func, args, kwargs, self.settings.autocast))


@dataclass(slots=True)
class Unfinished:
    """An entry before its op has run."""

    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    generator: torch.Generator | None
    generator_state: bytearray | None
    settings: NumericSettings

    @property
    def only_statistics(self) -> bool:
        """Whether all that it may overwrite are running statistics, which another run leaves alone."""
        return facts_of(self.func).batch_norm

    def finish(self, seen: Seen, outputs: Sequence[Tensor]) -> Entry:
        """The entry, now that it is known what the op made."""
        if len(outputs) == 1 and not seen.in_place:
            made = tuple([(0, n) for n, _ in seen.writes])
        else:
            replaced = {new for new, _ in seen.in_place}
            positions = {id(t): i for i, t in reversed(list(enumerate(outputs)))}
            made = tuple([(positions[id(t)], n) for n, t in seen.writes if n not in replaced])
        return Entry(
            self.func,
            self.args,
            self.kwargs,
            made,
            seen.in_place,
            tuple([n for n in seen.reads if n >= 0]),
            self.generator,
            self.generator_state,
            self.settings,
            checksum(t.untyped_storage() for _, t in seen.writes) if self._may_be_disturbed() else None,
        )

    def _may_be_disturbed(self) -> bool:
        """Whether a thread that knows no tape may have drawn between our look at the generator and the op."""
        generator = self.generator
        return generator is not None and generator.device.type == "cpu" and threading.active_count() > 1


def prepare(
    func: Any,
    facts: OpFacts,
    args: Any,
    kwargs: Any,
    autocast: Autocast,
    values: ValueMap,
    outside: dict[int, list[OutsideHandle]],
) -> Unfinished:
    """Everything that another run of the op needs, taken before its first run.

    Args:
        func: the operator.
        facts: about it.
        args: its arguments.
        kwargs: its keyword arguments.
        autocast: the devices for which it is on around the op.
        values: which value each tensor looks at.
        outside: where handles for tensors that the forward did not make are listed.
    """
    if facts.batch_norm:
        args = [None if i in RUNNING_STATISTICS and args[TRAINING] else a for i, a in enumerate(args)]
    generator = _generator_of(args, kwargs) if facts.random else None
    return Unfinished(
        func,
        [_template(a, values, outside) for a in args],
        {k: _template(a, values, outside) for k, a in kwargs.items()},
        generator,
        None if generator is None else state_of(generator),
        NumericSettings.now(autocast),
    )


def _template(tree: Any, values: ValueMap, outside: dict[int, list[OutsideHandle]]) -> Any:
    """An argument without tensors: made values by number and view, tensors from outside by alias (listed, too)."""
    if isinstance(tree, Tensor):
        storage = storage_of(tree)
        number = -1 if storage is None else values.number(storage)
        if number >= 0:
            return _Made(number, View.of(tree))
        alias = alias_of(tree)
        handle = OutsideHandle(alias, version_of(alias))
        if storage is not None:
            outside.setdefault(number, []).append(handle)
        return handle
    if isinstance(tree, (list, tuple)):
        if not any(isinstance(v, (Tensor, list, tuple, dict)) for v in tree):
            return tree
        return _Nest(type(tree), [_template(v, values, outside) for v in tree])
    if isinstance(tree, dict):
        keys = list(tree)
        return _Nest(
            lambda content: dict(zip(keys, content, strict=True)),
            [_template(v, values, outside) for v in tree.values()],
        )
    return tree


def _resolved(tree: Any, memory: dict[int, torch.UntypedStorage]) -> Any:
    """The argument of a template again."""
    kind = type(tree)
    if kind is _Made:
        return tree.view.on(memory[tree.number])
    if kind is OutsideHandle:
        tensor = tree.get()
        if _is_freed(tensor):
            raise _freed(tensor)
        return tensor
    if kind is _Nest:
        return tree.make([_resolved(v, memory) for v in tree.content])
    return tree


_ALIASING = torch._C.DispatchKey.ADInplaceOrView
_is_excluded, _is_included = (
    torch._C._dispatch_tls_is_dispatch_key_excluded,
    torch._C._dispatch_tls_is_dispatch_key_included,
)
_exclude, _include = torch._C._dispatch_tls_set_dispatch_key_excluded, torch._C._dispatch_tls_set_dispatch_key_included


def alias_of(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory that shares the version counter; to be called inside a dispatch mode."""
    excluded, included = _is_excluded(_ALIASING), _is_included(_ALIASING)
    _exclude(_ALIASING, False)  # guards of torch's would take several times as long
    _include(_ALIASING, True)
    try:
        return tensor.detach()
    finally:
        _exclude(_ALIASING, excluded)
        _include(_ALIASING, included)


def _is_freed(tensor: Tensor) -> bool:
    """Whether somebody (FSDP2) has taken the memory away from a tensor that still has elements."""
    storage = storage_of(tensor)
    return storage is not None and tensor.numel() > 0 and storage.nbytes() == 0


def _freed(tensor: Tensor) -> RuntimeError:
    return RuntimeError(
        f"an operator that autoremat runs again reads a tensor of size {list(tensor.shape)} whose memory has been "
        "freed (fully_shard frees parameters after the forward, and gathers them for the backward of the module): this "
        "part of the graph is reached outside the backward of the module; call fully_shard with "
        "reshard_after_forward=False, or undo autoremat.checkpoint with autoremat.restore"
    )


def version_of(tensor: Tensor) -> int:
    """The version counter; inference tensors, which have none, never change under autograd."""
    return 0 if tensor.is_inference() else tensor._version


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
    now = state_of(generator)
    set_state(generator, state)
    try:
        yield
    finally:
        set_state(generator, now)


def checksum(memory: Iterable[torch.UntypedStorage]) -> int:
    """A number that tells the contents of some memory apart."""
    total = 0
    for storage in memory:
        total = zlib.crc32(fingerprint(storage).to_bytes(8, "little"), total)
    return total


class ModifiedInPlace(RuntimeError):
    """What autograd raises for a saved tensor that has been modified in place."""


def modified(what: View | Tensor, probe: Tensor, expected: int) -> ModifiedInPlace:
    """The error for a tensor, in autograd's words."""
    size = list(what.size) if isinstance(what, View) else list(what.shape)
    return ModifiedInPlace(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{probe.type()} {size}] is at version {probe._version}; expected version {expected} instead. Hint: enable "
        "anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True)."
    )


def _disturbed(func: Any) -> RuntimeError:
    return RuntimeError(
        f"autoremat cannot draw the numbers of {func} again: another thread drew from the same generator at the same "
        "moment. Give that thread a torch.Generator of its own, or let the step use one"
    )
