"""What is made once of a program, and kept as long as the program lives."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from autoremat.program import Program

T = TypeVar("T")


class per_program(Generic[T]):  # noqa: N801 - a decorator
    """Makes a function of a program run once for each; what it returns must not keep the program alive.

    By identity, because comparing programs takes as long as looking at all of them.

    Args:
        make: the function.

    Attributes:
        kept: what it has returned, by the ``id`` of the program.
    """

    def __init__(self, make: Callable[[Program], T]) -> None:
        self._make = make
        self.kept: dict[int, tuple[weakref.ref[Program], T]] = {}
        functools.update_wrapper(self, make)

    def __call__(self, program: Program) -> T:
        """What was made of this program, or is made now."""
        key, kept = id(program), self.kept
        known = kept.get(key)
        if known is not None and known[0]() is program:
            return known[1]
        made = self._make(program)
        kept[key] = weakref.ref(program, lambda _: kept.pop(key, None)), made
        return made
