"""The state that decides, besides its arguments, what a call computes.

It consists of gradients on or off, inference mode, autocast (without its cache of weights), torch's numeric switches,
and the device that factories use. A call is rerun in the state in which it first ran.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch._C import _len_torch_function_stack as _n_modes
from torch._C import _pop_torch_function_stack, _push_on_torch_function_stack
from torch.overrides import _get_current_function_mode_stack

from autoremat.engines.torch.operators.facts import tensors_in
from autoremat.engines.torch.operators.settings import NumericSettings, set_state, state_of

DRAWING = threading.RLock()
"""Held while a generator's state is read, used or changed.

Other threads may draw from the same generator.
"""
_enter_vmap, _leave_vmap = torch._C._vmapmode_increment_nesting, torch._C._vmapmode_decrement_nesting
_layer = torch._C._functorch.peek_interpreter_stack
_DEVICES = ("cpu", "cuda")
_NO_GENERATORS = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float))
"""Types that are looked up faster than they are asked whether they are generators."""
_autocast_is_on, _set_autocast = torch.is_autocast_enabled, torch.set_autocast_enabled
_is_inference, _uses_cache, _use_cache = (
    torch.is_inference_mode_enabled, torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled
)  # fmt: skip


class State(NamedTuple):
    """The state of one moment; the same object as long as unchanged."""

    settings: NumericSettings
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    modes: tuple[Any, ...]
    """Function modes that see the call.

    torch's own mode for a default device is one.
    """

    @staticmethod
    def now() -> State:
        """Read the present state; takes some microseconds."""
        settings, inference = NumericSettings.now(), _is_inference()
        autocast = tuple([(d, torch.get_autocast_dtype(d)) for d in _DEVICES if _autocast_is_on(d)])
        modes = tuple(_get_current_function_mode_stack()) if _n_modes() else ()
        last = _LAST.state
        if (
            last is None or last.settings is not settings or last.inference is not inference
            or last.autocast != autocast or last.modes != modes
        ):  # fmt: skip
            last = _LAST.state = State(settings, inference, autocast, modes)
        return last

    @property
    def has_modes_of_others(self) -> bool:
        """Whether a foreign function mode sees the call.

        A rerun would run its code, too.
        """
        return any(not type(m).__module__.startswith("torch.") for m in self.modes)


class _Last(threading.local):
    state: State | None = None


_LAST = _Last()


class _Transforms:
    """What a batched backward runs in, switched off.

    It is that of ``torch.autograd.grad(..., is_grads_batched=True)``, or ``torch.vmap`` around ``torch.autograd.grad``.
    """

    __slots__ = ("_layers", "_levels")

    def __init__(self, levels: int) -> None:
        self._levels = levels
        self._layers: list[Any] = []
        for _ in range(levels):
            _leave_vmap()
        while _layer() is not None:
            self._layers.append(torch._C._functorch.pop_dynamic_layer_stack())

    def put_back(self) -> None:
        """Switch them on again."""
        while self._layers:
            torch._C._functorch.push_dynamic_layer_stack(self._layers.pop())
        for _ in range(self._levels):
            _enter_vmap()


def _without_transforms() -> _Transforms | None:
    """Switch transforms off, if there are any."""
    levels = _enter_vmap() - 1
    _leave_vmap()
    return _Transforms(levels) if levels or _layer() is not None else None


class Rerunning:
    """The block in which calls are rerun, each in its own state.

    No function mode and no transform of ``torch.func`` sees them. Everything is restored at the end, generators
    included: from the first call that draws until then no other thread may draw.
    """

    __slots__ = ("_before", "_cache", "_drawn", "_now", "_transforms", "_unseen")

    def __enter__(self) -> Rerunning:
        self._unseen = without_function_modes()
        self._unseen.__enter__()
        self._transforms = _without_transforms()
        self._before = self._now = State.now()
        self._cache = _uses_cache()
        self._drawn: dict[torch.Generator, bytearray] = {}
        if self._cache:
            _use_cache(False)  # the cache is for casts of the forward
        return self

    def __exit__(self, *error: object) -> None:
        if self._drawn:
            self._put_generators_back()
        if self._now is not self._before:
            self._switch(self._before)
        if self._cache:
            _use_cache(True)
        if self._transforms is not None:
            self._transforms.put_back()
        self._unseen.__exit__(None, None, None)

    def draw(self, generator: torch.Generator, state: bytearray) -> None:
        """Put a generator into an earlier state until the block ends."""
        if generator not in self._drawn:
            if not self._drawn:
                DRAWING.acquire()
            try:
                self._drawn[generator] = state_of(generator)
            except BaseException:
                if not self._drawn:
                    DRAWING.release()
                raise
        set_state(generator, state)

    def _put_generators_back(self) -> None:
        try:
            for generator, state in self._drawn.items():
                set_state(generator, state)
        finally:
            DRAWING.release()

    def use(self, state: State) -> contextlib.AbstractContextManager[Any]:
        """Switch to a call's state; make the call inside the result."""
        if state is not self._now:
            self._switch(state)
        if state.inference == self._before.inference and not state.modes:
            return _NOTHING
        return _inside(state)

    def _switch(self, state: State) -> None:
        now, self._now = self._now, state
        now.settings.switch_to(state.settings)
        if now.autocast != state.autocast:
            for device, _ in now.autocast:
                _set_autocast(device, False)
            for device, dtype in state.autocast:
                _set_autocast(device, True)
                torch.set_autocast_dtype(device, dtype)
            if state is self._before or not state.autocast:
                self._put_dtypes_back()

    def _put_dtypes_back(self) -> None:
        for device, dtype in self._before.autocast:
            torch.set_autocast_dtype(device, dtype)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _inside(state: State) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled() != state.inference:
            stack.enter_context(torch.inference_mode(state.inference))
        for mode in state.modes:
            stack.enter_context(mode)
        yield


class without_function_modes:  # noqa: N801 - a block
    """The block that no function mode and no tensor subclass sees."""

    __slots__ = ("_off", "_unseen")

    def __enter__(self) -> None:
        self._unseen = torch._C.DisableTorchFunction()
        self._unseen.__enter__()
        self._off: list[Any] = []
        while _n_modes():
            self._off.append(_pop_torch_function_stack())

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._off):
            _push_on_torch_function_stack(mode)
        self._unseen.__exit__(None, None, None)


heard_by_classes = torch._C._EnableTorchFunction
"""Lets tensor subclasses see calls, as in training, inside ``without_function_modes``."""


def generator_of(args: Any, kwargs: Any) -> torch.Generator:
    """Return the generator that a random call draws from.

    It is the one given, or else the default one of the call's device.
    """
    for a in (*args, *kwargs.values()):
        if type(a) not in _NO_GENERATORS and isinstance(a, torch.Generator):
            return a
    given = kwargs.get("device")
    first = next(iter(tensors_in((args, kwargs))), None)
    device = torch.device(given) if given is not None else first.device if first is not None else torch.device("cpu")
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return torch.default_generator
