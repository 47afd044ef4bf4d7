"""Finds out what a call does, from one run on fake tensors.

That is what it writes, whether it draws random numbers, and what it takes. No user code runs for it: of operators that
are not torch's own, only the schema is read.
"""

from __future__ import annotations

import logging
import random
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from autoremat.engines.torch.eager.arguments import mapped, requiring_grad, tensors_given, tensors_in
from autoremat.engines.torch.eager.state import State, heard_by_classes, without_function_modes
from autoremat.engines.torch.operators.facts import RUNNING_STATISTICS, TRAINING, facts_of
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import (
    Jagged,
    has_inside,
    is_distributed,
    is_jagged,
    is_taken_apart,
    knows_ragged_sizes,
    local_of,
)
from autoremat.engines.torch.operators.signature import signature_of
from autoremat.engines.torch.operators.timing import estimate
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.dense import covers_storage
from autoremat.engines.torch.recording.recorder import ASKS_FOR_DEVICE
from autoremat.program.once import Once, Reason

OPAQUE, UNKNOWN, FOREIGN = Reason(Once.OPAQUE), Reason(Once.UNKNOWN), Reason(Once.FOREIGN)
OVERRIDDEN, DUAL, CALLBACK = Reason(Once.OVERRIDDEN), Reason(Once.DUAL), Reason(Once.CALLBACK)
_OF_C = (types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType, types.BuiltinFunctionType)
_OWN_NAMESPACES = ("aten", "prims", "prim")


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What one call does.

    Attributes:
        written: positions, among the tensors given, of those that are overwritten.
        statistics: positions of running statistics, which a rerun must not change.
        covered: positions of what is overwritten as a whole, without being read.
        uninitialised: the result is whatever the memory held before.
        random: it draws from a generator, or may.
        once: why it must not be rerun; None where it may.
        foreign: not torch's own: it may be rerun once it has been seen to give the same.
        seconds: an estimate.
        nbytes: what it makes, temporaries included; an estimate.
    """

    written: tuple[int, ...] = ()
    statistics: tuple[int, ...] = ()
    covered: tuple[int, ...] = ()
    uninitialised: bool = False
    random: bool = False
    once: Reason | None = None
    foreign: bool = False
    leaves: bool = False
    """Whether the call may have left unseen effects.

    It may have changed something that nobody sees, or have told others; its step must not be tried again.
    """
    seconds: float = 0.0
    nbytes: int = 0


_KNOWN: dict[Any, CallFacts] = {}
"""Facts by what makes two calls alike, sizes included."""
_OF_OTHER_SIZES: dict[Any, dict[tuple[int, ...], CallFacts]] = {}
"""Facts by what makes calls alike but for sizes, then by sizes.

Only calls that were looked at are here.
"""
MAX_KNOWN: Final = 1 << 16
"""Number of calls whose facts are remembered."""
MANY_SIZES: Final = 32
"""This many sizes of otherwise equal calls are each looked at.

That tells best what the calls take.
"""
NEAR: Final = 1.5
"""A call that takes no more than so many times as much as a known one is not looked at.

Nor is one that takes no less than that part of it.
"""
_SIZE: Final = 9
"""An integer from here on is taken for a size.

A smaller one may be a dimension, or choose what is computed.
"""


def facts_of_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], state: State, *, is_plain: bool = False
) -> CallFacts:
    """Return the facts of a call.

    Calls of the same function on tensors of the same kind are looked at once per process.

    Args:
        func: what is called.
        args: its arguments.
        kwargs: its keyword arguments.
        state: in which it is made.
        is_plain: all tensors are torch's own, and their memory can be seen.
    """
    if is_plain and not state.modes and not _of_functorch() and forward_ad._current_level < 0:
        try:
            known = _KNOWN.get(_key(func, args, kwargs, state))
        except TypeError:
            known = None
        if known is not None:
            return known
    given = tensors_given(args, kwargs)
    if (
        any(torch.nn.parameter.is_lazy(t) or (storage_of(t) is None and not has_inside(t)) for t in given)
        or _of_functorch()
    ):
        return CallFacts(written=_written_by_name(func, kwargs, given), once=OPAQUE)
    if state.has_modes_of_others or any(map(is_overridden, given)):
        return CallFacts(written=_written_by_name(func, kwargs, given), random=True, once=OVERRIDDEN)
    if forward_ad._current_level >= 0:  # forward-mode tangents are attached to the tensors themselves
        return CallFacts(written=_written_by_name(func, kwargs, given), random=True, once=DUAL)
    if not is_torchs(func):
        return _of_schema(func, args, kwargs, given)
    if any(isinstance(a, (types.FunctionType, types.MethodType)) for a in (*args, *kwargs.values())):
        return CallFacts(written=_written_by_name(func, kwargs, given), once=CALLBACK)
    if any(map(is_distributed, given)):
        return _distributed(func, kwargs, given)
    if any(map(is_jagged, given)):
        return _probed(func, args, kwargs, given)
    try:
        key = _key(func, args, kwargs, state)
        known = _KNOWN.get(key)
    except TypeError:
        return _probed(func, args, kwargs, given)
    if known is None:
        if len(_KNOWN) >= MAX_KNOWN:
            _KNOWN.clear()
            _OF_OTHER_SIZES.clear()
        known = _KNOWN[key] = _like_larger(func, args, kwargs, given, state)
    return known


def _like_larger(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor], state: State
) -> CallFacts:  # fmt: skip
    """Return facts of a call, perhaps those of one of other sizes.

    How large things are does not decide what a call does, as long as nothing is empty or single and everything lies in
    memory the same way. So a call that is alike but for sizes is looked at only if its sizes are not near to known
    ones. Where many sizes have come, the facts may be those of a call of sizes up to twice as large: it takes no more
    than that. So where sizes are new in every step, in the end only a few calls are looked at for every doubling of the
    sizes.
    """
    sizes: list[int] = []
    described = _but_for_sizes((args, tuple(kwargs.items())), _decides_by_floats(func), sizes)
    key = func, described, *_around(state)
    known = _OF_OTHER_SIZES.setdefault(key, {})
    mine = tuple(sizes)
    for theirs, facts in known.items():
        if len(known) >= MANY_SIZES and all(a <= b <= 2 * a for a, b in zip(mine, theirs, strict=True)):
            return facts
        if (more := _times_as_much(mine, theirs)) is not None:
            return replace(facts, seconds=more * facts.seconds, nbytes=ceil(more * facts.nbytes))
    facts = known[mine] = _probed(func, args, kwargs, given)
    return facts


def _times_as_much(mine: Sequence[int], theirs: Sequence[int]) -> float | None:
    """Bound a call, as a multiple of one of near sizes.

    None where the sizes are not near.

    What a call makes grows with the square of a size at most, as products of matrices do.
    """
    more, less = 1.0, 1.0
    for a, b in set(zip(mine, theirs, strict=True)):
        if a > b:
            more *= (a / b) ** 2
        elif a < b:
            less *= (b / a) ** 2
    return more if more <= NEAR and less <= NEAR else None


def _but_for_sizes(item: Any, floats: bool, sizes: list[int]) -> Any:
    """Describe something without its sizes, which are appended to a list."""
    kind = type(item)
    if isinstance(item, Tensor):
        shape = tuple(item.size())
        sizes += shape
        return item.dtype, tuple([min(n, 2) for n in shape]), _layout(item), item.device, item.requires_grad
    if kind is tuple or kind is list or kind is torch.Size:
        return kind, *(_but_for_sizes(part, floats, sizes) for part in item)
    if kind is slice:
        return kind, _but_for_sizes((item.start, item.stop, item.step), floats, sizes)
    if kind is int and item >= _SIZE:
        sizes.append(item)
        return kind
    return kind if isinstance(item, torch.Generator) or (kind is float and not floats) else (kind, item)


def _layout(tensor: Tensor) -> Any:
    """Describe how a tensor lies in memory.

    Sizes are left out where there are no gaps and no overlaps.
    """
    if tensor.layout is not torch.strided:
        return tensor.layout
    if tensor.is_contiguous():
        return True
    stride, shape, n = tensor.stride(), tensor.size(), 1
    order = tuple(sorted(range(len(stride)), key=stride.__getitem__))
    for k in order:
        if stride[k] != n:
            return stride
        n *= shape[k]
    return order


def _around(state: State) -> tuple[Any, ...]:
    return state.settings.grad_enabled, state.inference, state.autocast


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: State) -> Any:
    """Describe what makes two calls alike.

    Raises:
        TypeError: an argument is of a type that calls cannot be remembered by.
    """
    floats = _decides_by_floats(func)
    named = (tuple(kwargs), _alike(kwargs.values(), floats)) if kwargs else None
    return func, _alike(args, floats), named, *_around(state)


def _decides_by_floats(func: Any) -> bool:
    return getattr(func, "__name__", "") not in _ARITHMETIC


def _alike(items: Iterable[Any], floats: bool) -> tuple[Any, ...]:
    found: list[Any] = []
    for item in items:
        kind = type(item)
        if isinstance(item, Tensor):
            stride = item.stride() if item.layout is torch.strided else ()
            found += (item.dtype, item.size(), stride, item.device, item.requires_grad)
        elif kind is float and not floats:
            found.append(float)
        elif kind in _PLAIN_ARGUMENTS:
            found += (kind, item)
        elif kind is list or kind is tuple:
            found += (kind, _alike(item, floats))
        elif kind is slice:
            found += (kind, _alike((item.start, item.stop, item.step), floats))
        elif isinstance(item, torch.Generator):
            found.append(kind)
        else:
            raise TypeError(kind)
    return tuple(found)


_ARITHMETIC: Final = frozenset(
    f"{around}{prefix}{name}{suffix}{around}"
    for name in ("add", "sub", "mul", "div", "truediv", "true_divide", "subtract", "multiply", "divide")
    for around, prefix, suffix in (("", "", ""), ("", "", "_"), ("__", "", ""), ("__", "r", ""), ("__", "i", ""))
)
"""Functions that do the same whatever the value of their numbers."""
_PLAIN_ARGUMENTS: Final = frozenset(
    {int, float, bool, complex, str, type(None), type(...), torch.dtype, torch.device, torch.layout,
     torch.memory_format, torch.Size}
)  # fmt: skip


def is_torchs(func: Any) -> bool:
    """Tell whether a function is torch's own."""
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        name = func.namespace if isinstance(func, OpOverload) else func._qualified_op_name.partition("::")[0]
        return name in _OWN_NAMESPACES
    module = getattr(func, "__module__", None)
    if module is None:  # methods of tensors and their getters
        return isinstance(func, _OF_C)
    return module == "torch" or module.startswith("torch.")


def is_overridden(tensor: Tensor) -> bool:
    """Tell whether calls on a tensor run foreign code of its class."""
    kind = type(tensor)
    if kind is Tensor or kind is torch.nn.Parameter or kind.__module__.startswith("torch."):
        return False
    return getattr(kind.__torch_function__, "__func__", None) is not _PLAIN


_PLAIN = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def _of_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _distributed(func: Any, kwargs: dict[str, Any], given: Sequence[Tensor]) -> CallFacts:
    """Return the facts of a call on DTensors, without making it.

    What it writes is told by its name; that it communicates, by the recording.
    """
    written = _written_by_name(func, kwargs, given)
    return CallFacts(written=written, seconds=1e-5, once=Reason(Once.DISTRIBUTED), leaves=True)


def _written_by_name(func: Any, kwargs: dict[str, Any], given: Sequence[Tensor]) -> tuple[int, ...]:
    """Find what a call overwrites by torch's naming conventions.

    Used where nothing better is known.
    """
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    found = (
        {0}
        if given and (in_place or (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")))
        else set()
    )
    if name == "__setitem__" and given:
        found.add(0)
    out = tensors_in(kwargs.get("out")) if kwargs else []
    found |= {i for i, t in enumerate(given) if any(t is o for o in out)}
    return tuple(sorted(found))


def _of_schema(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]) -> CallFacts:
    """Return the facts of a foreign operator, as its schema declares them."""
    overload = func if isinstance(func, OpOverload) else None
    if isinstance(func, OpOverloadPacket) and len(func.overloads()) == 1:
        overload = getattr(func, func.overloads()[0])
    if overload is None:
        return CallFacts(written=_written_by_name(func, kwargs, given), random=True, once=FOREIGN, leaves=True)
    facts = facts_of(overload)
    written = facts.written(args, kwargs)
    positions = tuple(i for i, t in enumerate(given) if any(t is w for w in written))
    nbytes = sum(t.nbytes for t in given)
    once = facts.once if facts.communicates else None
    return CallFacts(
        written=positions,
        random=True,
        once=once,
        foreign=True,
        leaves=True,
        seconds=1e-5 + nbytes / 1e10,
        nbytes=nbytes,
    )


@contextmanager
def unseen() -> Iterator[None]:
    """Hide this block from the user's function modes and dispatch modes."""
    anomaly = torch.autograd.set_detect_anomaly(False) if torch.is_anomaly_enabled() else nullcontext()
    with without_function_modes(), anomaly:
        if not _get_current_dispatch_mode_stack():
            yield
            return
        with _disable_current_modes():
            yield


@contextmanager
def without_complaints() -> Iterator[None]:
    """Keep torch from logging what fake kernels do not know.

    In this thread, that is no error.
    """
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    _LOG_OF_FAKES.addFilter(is_of_others)
    try:
        yield
    finally:
        _LOG_OF_FAKES.removeFilter(is_of_others)


_LOG_OF_FAKES: Final = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore Python's generator after the block; torch's Python code may draw."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


class _Own(threading.local):
    """Holds a thread's fake mode.

    Making such a mode takes as long as an operator.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)


_OWN = _Own()


@dataclass
class _Probe(TorchDispatchMode):
    """Watches the operators of one call, on fake tensors."""

    inputs: dict[int, int]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __post_init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()
        self.statistics: set[int] = set()
        self.covered: set[int] = set()
        self.uninitialised = False
        self.random = False
        self.once: Reason | None = None
        self.communicates = False
        self.seconds = 0.0
        self.nbytes = 0
        self.begun: list[OpOverload] = []

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator of the call."""
        kwargs = kwargs or {}
        if func is ASKS_FOR_DEVICE and type(args[0]) is FakeTensor:
            return args[0].device
        if is_taken_apart(types):
            return NotImplemented
        if func.namespace == "prim":
            return func(*args, **kwargs)
        facts = facts_of(func)
        self.begun.append(func)
        self.random |= facts.random
        self.once = self.once or facts.once
        self.communicates |= facts.communicates
        self.uninitialised = facts.uninitialised
        if facts.batch_norm and args[TRAINING]:
            self.statistics |= set(self._positions([args[i] for i in RUNNING_STATISTICS]))
        else:
            written = facts.written(args, kwargs)
            if facts.overwriting and covers_storage(args[0]):
                self.covered |= set(self._positions(written)) - self.written
            self.written |= set(self._positions(written))
        out = func(*args, **kwargs)
        if not facts.is_view:
            made = sum(t.nbytes for t in tensors_in(out) if t.layout is torch.strided)
            self.nbytes += made
            self.seconds += estimate(signature_of(func, args, kwargs), made).seconds
        return out

    def is_all_of(self, func: Any) -> bool:
        """Tell whether a failed call is one operator, known by its schema."""
        told = not (self.once or self.written or self.statistics or self.random or self.uninitialised)
        names = [op._schema.name.rpartition("::")[2] for op in self.begun]
        return told and names == [getattr(func, "__name__", "")]

    def _positions(self, tensors: Sequence[Any]) -> Iterator[int]:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                position = self.inputs.get(tensor.untyped_storage()._cdata)
                if position is not None:
                    yield position


def _probed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]) -> CallFacts:
    """Make the call on fake tensors of the same kind and watch."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if any(map(is_jagged, given)) else _OWN.mode
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes and is_jagged(tensor):
            knows_ragged_sizes(mode)
            inside = Jagged.of(tensor).converted(fake).around(fake(local_of(tensor)).detach())
            fakes[id(tensor)] = inside.requires_grad_(tensor.requires_grad)
        elif id(tensor) not in fakes:
            made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            if tensor.requires_grad and is_leaf(tensor):
                made = requiring_grad(made)
            elif tensor.requires_grad:
                made = requiring_grad(made).clone()
            fakes[id(tensor)] = made
        return fakes[id(tensor)]

    with generators_kept(), unseen(), mode, torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda p: p):
        fake_args, fake_kwargs = mapped(args, fake), mapped(kwargs, fake)
        seen = [local_of(fakes[id(t)]).untyped_storage()._cdata for t in given]
        probe = _Probe({address: i for i, address in reversed(list(enumerate(seen)))})
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with heard_by_classes(), without_complaints(), probe:
                func(*fake_args, **fake_kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass  # the operators seen so far tell what the call does
        except Exception:  # noqa: BLE001 - whatever a fake kernel does not know
            if probe.is_all_of(func):
                return replace(_of_schema(probe.begun[0], args, kwargs, given), random=False, leaves=False)
            probe.once = probe.once or UNKNOWN
            probe.written |= set(_written_by_name(func, kwargs, given))
        finally:
            torch.set_autocast_cache_enabled(cache)
    return CallFacts(
        tuple(sorted(probe.written)), tuple(sorted(probe.statistics)), tuple(sorted(probe.covered)),
        probe.uninitialised, probe.random, probe.once, leaves=probe.communicates or probe.once == UNKNOWN,
        seconds=probe.seconds, nbytes=probe.nbytes,
    )  # fmt: skip
