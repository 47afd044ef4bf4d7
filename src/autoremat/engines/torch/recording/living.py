"""Names whoever holds fake tensors that outlive a recording here.

A step that uses such a tensor trains nothing, and shows no error. So an error names every holder.
"""

from __future__ import annotations

import gc
import traceback
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import Tensor
from torch._subclasses import FakeTensor

_NAMED: Final = 3
"""At most this many holders are named."""
_LOOKED_AT: Final = 10_000
"""A larger container is not searched for the item's position."""


class Living:
    """The fake tensors of a recording that are still alive."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[Tensor]] = []

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remember what an operator has returned."""
        self._made += [weakref.ref(t) for t in tensors if isinstance(t, FakeTensor)]

    def holders(self) -> list[str]:
        """Describe who holds the surviving tensors; call after the recording.

        Each holder is named once.
        """
        for generation in range(3):  # graphs have cycles; they are young, and old objects take long to look through
            if not any(ref() is not None for ref in self._made):
                return []
            gc.collect(generation)
        left = [t for ref in self._made if (t := ref()) is not None]
        found: dict[str, None] = {}
        for tensor in left:
            found.update(dict.fromkeys(_holders(tensor, {id(left)})))
            if len(found) >= _NAMED:
                break
        return list(found) or ["something that Python's garbage collector cannot see (an object of C++)"] * bool(left)


def let_go_of_frames(error: BaseException) -> None:
    """Empty the frames of an error: lines stay, their variables go."""
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)


def let_go_of_lines(error: BaseException) -> None:
    """Drop the frames of an error altogether.

    Even an empty frame refers to its function, and the function to what it was defined in.
    """
    for link in _chain(error):
        link.__traceback__ = None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those behind it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _holders(thing: Any, ours: set[int]) -> Iterator[str]:
    """Describe whatever refers to a thing, except our frames and lists."""
    for holder in gc.get_referrers(thing):
        if id(holder) in ours or isinstance(holder, weakref.ReferenceType):
            continue
        if isinstance(holder, types.FrameType) and holder.f_globals.get("__name__", "").startswith("autoremat."):
            continue
        yield _place(thing, holder, ours)


def _place(thing: Any, holder: Any, ours: set[int]) -> str:
    """Describe where in its holder the thing is."""
    if isinstance(holder, Mapping) and type(holder) is dict:
        return _place_in_dict(thing, holder, ours)
    if isinstance(holder, types.FrameType):
        return f"the variable {_key_of(thing, holder.f_locals)} of {holder.f_code.co_name}()"
    if isinstance(holder, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
        frame = getattr(holder, "gi_frame", None) or getattr(holder, "cr_frame", None)
        return f"the variable {_key_of(thing, frame.f_locals if frame else {})} of the generator {holder.__qualname__}"
    if isinstance(holder, types.CellType):
        return f"a variable of {_function_with(holder)}"
    if isinstance(holder, (list, tuple)) and len(holder) <= _LOOKED_AT:
        index = next((i for i, v in enumerate(holder) if v is thing), None)
        return f"item {index} of {_owned(holder, ours, f'a {type(holder).__name__}')}"
    for cls in type(holder).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType) and getattr(holder, name, None) is thing:
                return f"the attribute {name} of a {_type_of(holder)}"
    return _owned(holder, ours, f"a {_type_of(holder)}")


def _place_in_dict(thing: Any, holder: dict[Any, Any], ours: set[int]) -> str:
    key = _key_of(thing, holder)
    if "__name__" in holder and "__builtins__" in holder:
        return f"the variable {key} of the module {holder['__name__']}"
    for owner in gc.get_referrers(holder):
        if getattr(owner, "__dict__", None) is holder:
            return f"the attribute {key} of a {_type_of(owner)}"
    return f"the item {key} of {_owned(holder, ours, 'a dict')}"


def _owned(holder: Any, ours: set[int], what: str) -> str:
    """Describe a container, with the attribute or variable that holds it."""
    for owner in gc.get_referrers(holder):
        if id(owner) in ours or not isinstance(owner, dict):
            continue
        name = _key_of(holder, owner)
        if "__name__" in owner and "__builtins__" in owner:
            return f"{what}, {owner['__name__']}.{name.strip(chr(39))}"
        for above in gc.get_referrers(owner):
            if getattr(above, "__dict__", None) is owner:
                return f"{what}, the attribute {name} of a {_type_of(above)}"
    return what


def _function_with(cell: types.CellType) -> str:
    for owner in gc.get_referrers(cell):
        for function in gc.get_referrers(owner) if isinstance(owner, tuple) else ():
            if isinstance(function, types.FunctionType):
                names = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
                name = next((n for n, c in names if c is cell), "?")
                return f"{name!r} in the closure of {function.__qualname__}()"
    return "a closure"


def _key_of(thing: Any, mapping: Mapping[Any, Any]) -> str:
    if len(mapping) > _LOOKED_AT:
        return "?"
    return next((_short(key) for key, value in list(mapping.items()) if value is thing), "?")


def _short(key: Any) -> str:
    text = repr(key) if isinstance(key, (str, int, float, bool, bytes, tuple)) else f"<{_type_of(key)}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_of(thing: Any) -> str:
    cls = type(thing)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"
