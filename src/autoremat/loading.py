"""Loads the training step, or the function, that a command line names.

It is ``package.module:function`` or ``path/to/file.py:function``; a file alone stands for its function ``step``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any


class NoSuchStep(ValueError):
    """What the command line names is not there.

    The message says what would be accepted.
    """


class BrokenStep(ValueError):
    """What the command line names cannot be used.

    It is there; the message says why it cannot.
    """


@dataclass(frozen=True)
class Step:
    """A callable with the arguments to record it with."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_step(target: str) -> Step:
    """Import the file or module, and call the function without arguments.

    The function returns ``(fn, args)`` or ``(fn, args, kwargs)``. The folder of a file, or the current one, is
    importable from then on, as it is for a script.

    Raises:
        NoSuchStep: not of that form, no such file, module or function.
        BrokenStep: the file cannot be imported, the function raises, or returns something else.
    """
    make = load_function(f"{target}:step" if target.endswith(".py") else target)
    try:
        made = make()
    except Exception as error:
        raise BrokenStep(f"{target} raised {_said(error)}; call it in Python to look into it") from error
    return _step(target, made)


def load_function(target: str) -> Callable[..., Any]:
    """Import the file or module, and look the function up.

    Raises:
        NoSuchStep: not of that form, no such file, module or function.
        BrokenStep: the file cannot be imported.
    """
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise NoSuchStep(f"{target!r} names no function; write package.module:function or path/to/file.py:function")
    found = getattr(_module(place), name, None)
    if not callable(found):
        raise NoSuchStep(f"{place} has no function {name!r}; it has: {_functions(_module(place))}")
    return found


def _module(place: str) -> ModuleType:
    path = Path(place)
    if path.suffix != ".py" and not path.is_dir() and path.name == place:
        return _imported(place, place, Path.cwd())
    if not path.is_file():
        raise NoSuchStep(f"there is no file {place}; write package.module:function or path/to/file.py:function")
    return _imported(path.stem, place, path.resolve().parent, path)


def _imported(name: str, place: str, folder: Path, path: Path | None = None) -> ModuleType:
    """Import a module by name or from a file, once."""
    known = sys.modules.get(name)
    if known is not None and (path is None or Path(known.__file__ or "") == path.resolve()):
        return known
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name) if path is None else _executed(name, path.resolve())
    except Exception as error:
        if path is None and isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise NoSuchStep(
                f"there is no module {error.name!r} in {folder} or among what is installed; "
                "for a file write path/to/file.py:function"
            ) from error
        raise BrokenStep(f"{place} cannot be imported: {_said(error)}") from error


def _executed(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise
    return module


def _functions(module: ModuleType) -> str:
    own = [
        name
        for name, thing in vars(module).items()
        if callable(thing) and getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_")
    ]
    return ", ".join(own) or "none"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _step(target: str, made: Any) -> Step:
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[0]):
        raise BrokenStep(f"{target} returned {_kind(made)}; it must return (fn, args) or (fn, args, kwargs)")
    fn, args, *rest = made
    if not isinstance(args, tuple | list):
        raise BrokenStep(f"{target}: args must be a tuple such as (x, y), got {_kind(args)}; one argument is (x,)")
    if rest and not isinstance(rest[0], Mapping):
        raise BrokenStep(f"{target}: kwargs must be a dict, got {_kind(rest[0])}")
    return Step(fn, tuple(args), dict(rest[0]) if rest else {})


def _kind(thing: Any) -> str:
    if isinstance(thing, tuple):
        return f"a tuple of {len(thing)} ({', '.join(type(t).__name__ for t in thing)})"
    return type(thing).__name__
