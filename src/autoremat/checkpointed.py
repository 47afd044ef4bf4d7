"""What stands in place of a checkpointed module's forward or callable."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from autoremat.engines.torch.eager.measure import Measurement, meter_for
from autoremat.engines.torch.eager.options import Options
from autoremat.engines.torch.eager.session import Session
from autoremat.engines.torch.operators.compiled import (
    compiled_alike,
    inside_compiled,
    is_compiled_callable,
    is_compiling,
    options_of,
)

if TYPE_CHECKING:
    from autoremat.engines.torch.compiled.session import CompiledSession

_MARK = "__autoremat__"
_numbers = itertools.count()
_OF_A_METHOD: Final = frozenset(
    {"__closure__", "__code__", "__defaults__", "__func__", "__globals__", "__kwdefaults__", "__self__"}
)


class Forward:
    """Stands in for ``forward`` on one module.

    It is copied and pickled along with the module.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        self.module, self.options = module, options
        self.replaced = vars(module).get("forward")
        self._wrap()

    def _wrap(self) -> None:
        plain = self.replaced or types.MethodType(type(self.module).forward, self.module)
        functools.update_wrapper(self, type(self.module).forward, updated=())
        self.__wrapped__ = plain  # already bound: the signature is that of a call
        fn = _PlainForward(self.module, plain)
        self.session = Session(fn, self.options, measure=self.options.measure)
        self.compilable = Compilable(fn, self.session, self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward under its plan."""
        return _called(self.compilable, self.__wrapped__, args, kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """Pretend to be a method to ``inspect.ismethod``, and to nobody else.

        So TorchScript (``torch/jit/_recursive.py``, 2.13) finds the code that it compiles.
        """
        asks = sys._getframe(1).f_code
        return types.MethodType if asks is inspect.ismethod.__code__ else Forward

    def __getattr__(self, name: str) -> Any:
        """Return attributes that a bound method has and this object lacks.

        ``torch.jit.script`` and ``torch.export``, which read code, ask for them.
        """
        if name not in _OF_A_METHOD or "module" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(types.MethodType(type(self.module).forward, self.module), name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave plans behind: they are made anew where they are needed."""
        return {"module": self.module, "options": self.options, "replaced": self.replaced}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wrap()


class Compilable:
    """A checkpointed callable as the compiler meets it.

    Args:
        fn: the callable, without autoremat.
        session: runs it where no compiler is about.
        options: the user's.
    """

    def __init__(self, fn: Callable[..., Any], session: Session, options: Options) -> None:
        self.fn, self.session, self.options = fn, session, options
        self.key = f"callable {next(_numbers)}"  # the compiler takes text for a constant
        self.apart: Callable[..., Any] = fn
        """Makes a call of the callable compiled by itself, once a compiler has met it."""
        self.compiled: CompiledSession | None = None
        _COMPILABLE[self.key] = self

    def met(self) -> str:
        """Say how the tracing compiler goes on: ``inline``, ``apart`` or ``plain``."""
        from autoremat.engines.torch.compiled.meeting import apart, meet
        from autoremat.engines.torch.compiled.session import CompiledSession

        if self.compiled is None:
            self.compiled = CompiledSession(self.fn, self.options, _measurement if self.options.measure else None)
            self.apart = apart(self.compiled)
        return meet(self.compiled, _OURS)

    def is_apart(self) -> bool:
        """Tell whether the compiler has left this call to Python.

        It does so where it does not trace all of its caller.
        """
        return self.compiled is not None and is_compiling()


def _measurement(tensors: Sequence[Tensor], on_end: Callable[[int], None]) -> Measurement | None:
    """Begin to measure a step on these tensors."""
    meter = meter_for(tensors, asked=True)
    return None if meter is None else Measurement(meter, False, on_end)


def _met_by_compiler(key: str) -> str:
    """Say how the compiler is to go on.

    It calls this while it traces, and puts nothing of it into its graph.
    """
    return _COMPILABLE[key].met()


_met_by_compiler._dynamo_marked_constant = True  # type: ignore[attr-defined]  # assume_constant_result imports the compiler
_COMPILABLE: Final[weakref.WeakValueDictionary[str, Compilable]] = weakref.WeakValueDictionary()


def _called(compilable: Compilable, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Make a call under its plan, or as the tracing compiler wants."""
    if torch.compiler.is_compiling():
        how = _met_by_compiler(compilable.key)
        if how == "inline":
            return plain(*args, **kwargs)
        if how == "apart":
            return compilable.apart(args, kwargs)
    elif compilable.is_apart():
        return compilable.apart(args, kwargs)
    return compilable.session.call(args, kwargs)


_OURS: Final = {Forward.__call__.__code__, _called.__code__}
"""The code of what stands in the place of checkpointed callables."""


class _PlainForward:
    """A module's own forward, with the module visible to the recorder."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self._forward = module, forward
        self.__name__ = type(module).__name__

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the forward, for messages that name an argument."""
        return inspect.signature(self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


def checkpoint_module(module: nn.Module, options: Options) -> nn.Module:
    """Give the module a forward that follows plans; return the module."""
    inner = inside_compiled(module)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has no parameters that require grad, so there is no backward pass to save memory "
            "for; to checkpoint a computation on inputs that require grad, wrap a function instead of the module"
        )
    inner.forward = Forward(inner, options)
    return module


def checkpoint_callable(fn: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Wrap a callable so that it follows plans."""
    if is_compiled_callable(fn):
        return compiled_alike(fn, lambda inner: checkpoint_callable(inner, options))
    compilable = Compilable(fn, Session(fn, options, measure=options.measure), options)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return _called(compilable, fn, args, kwargs)

    _OURS.add(checkpointed.__code__)
    functools.update_wrapper(checkpointed, fn)
    setattr(checkpointed, _MARK, compilable)
    return checkpointed


def plain_callable(target: Any) -> Any:
    """Return what a checkpointed callable was before.

    A compiled one is compiled as it was.
    """
    compilable = _compilable_of(target)
    assert compilable is not None
    fn = compilable.fn
    return compiled_alike(target, lambda inner: fn) if is_compiled_callable(target) else fn


def session_of(target: Any) -> Session | None:
    """Return the session of a checkpointed module or callable, else None."""
    compilable = _compilable_of(target)
    return None if compilable is None else compilable.session


def compiled_of(target: Any) -> CompiledSession | None:
    """Look up what a compiler has made of something checkpointed.

    None where none has met it.
    """
    compilable = _compilable_of(target)
    if compilable is not None:
        return compilable.compiled
    if (options := options_of(target)) is None:
        return None
    from autoremat.backend import session_of_options

    return session_of_options(options)


def _compilable_of(target: Any) -> Compilable | None:
    if isinstance(target, nn.Module):
        target = inside_compiled(target)
        forward = vars(target).get("forward")
        while forward is not None and not isinstance(forward, Forward):
            forward = getattr(forward, "__wrapped__", None)  # a library may have wrapped it once more
        return forward.compilable if isinstance(forward, Forward) and forward.module is target else None
    found = getattr(target, _MARK, None)
    return found if isinstance(found, Compilable) else None
