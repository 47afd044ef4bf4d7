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
_DEVICES = ("cpu", "cuda")
_autocast_is_on, _set_autocast = torch.is_autocast_enabled, torch.set_autocast_enabled


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
        settings, inference = NumericSettings.now(), torch.is_inference_mode_enabled()
        autocast = tuple([(d, torch.get_autocast_dtype(d)) for d in _DEVICES if _autocast_is_on(d)])
        modes = tuple(_get_current_function_mode_stack()) if _n_modes() else ()
        now = State(settings, inference, autocast, modes)
        last = _LAST.state
        if last is None or last.settings is not settings or last[1:] != now[1:]:
            last = _LAST.state = now
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


class Rerunning:
    """The block in which calls are rerun, each in its own state.

    No function mode sees them. Everything is restored at the end.
    """

    __slots__ = ("_before", "_cache", "_now", "_unseen")

    def __enter__(self) -> Rerunning:
        self._unseen = without_function_modes()
        self._unseen.__enter__()
        self._before = self._now = State.now()
        self._cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # the cache is for casts of the forward
        return self

    def __exit__(self, *error: object) -> None:
        self._switch(self._before)
        torch.set_autocast_cache_enabled(self._cache)
        self._unseen.__exit__(None, None, None)

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


@contextlib.contextmanager
def generator_at(generator: torch.Generator, state: bytearray) -> Iterator[None]:
    """Put a generator into an earlier state for the block."""
    with DRAWING:
        now = state_of(generator)
        set_state(generator, state)
        try:
            yield
        finally:
            set_state(generator, now)


def generator_of(args: Any, kwargs: Any) -> torch.Generator:
    """Return the generator that a random call draws from.

    It is the one given, or else the default one of the call's device.
    """
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
