"""What stands in place of a checkpointed module's forward or callable."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from autoremat.engines.torch.eager.options import Options
from autoremat.engines.torch.eager.session import Session

_MARK = "__autoremat__"
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
        self.session = Session(_PlainForward(self.module, plain), self.options, measure=self.options.measure)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward under its plan."""
        return self.session.call(args, kwargs)

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
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has no parameters that require grad, so there is no backward pass to save memory "
            "for; to checkpoint a computation on inputs that require grad, wrap a function instead of the module"
        )
    module.forward = Forward(module, options)
    return module


def checkpoint_callable(fn: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """Wrap a callable so that it follows plans."""
    session = Session(fn, options, measure=options.measure)

    @functools.wraps(fn)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return session.call(args, kwargs)

    setattr(checkpointed, _MARK, session)
    return checkpointed


def session_of(target: Any) -> Session | None:
    """Return the session of a checkpointed module or callable, else None."""
    if isinstance(target, nn.Module):
        forward = vars(target).get("forward")
        while forward is not None and not isinstance(forward, Forward):
            forward = getattr(forward, "__wrapped__", None)  # a library may have wrapped it once more
        return forward.session if isinstance(forward, Forward) and forward.module is target else None
    session = getattr(target, _MARK, None)
    return session if isinstance(session, Session) else None
