"""Tells whether a rerun drew the same random numbers.

Other threads may draw from the same generator.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.contents import content_of
from autoremat.engines.torch.operators.settings import next_numbers_of

Numbers = tuple[float, int]


class Disturbed(RuntimeError):
    """Another thread drew from the same generator as a call.

    The call's numbers cannot be drawn again.
    """


@dataclass(slots=True)
class Draws:
    """Evidence of which random numbers a call drew.

    Either the generator ends where it did, so nobody drew in between. Or another thread drew after the call, before the
    state was read: then what the call made is the same. Bytes that a call leaves as it found them differ from run to
    run, so results decide only where the generator does not.

    Attributes:
        generator: that the call draws from.
        saved: the numbers that the generator draws next, by position among what autograd saves inside the call.
        after: those after the call; None as long as it runs.
        contents: checksums of what the call makes, by value, where nothing overwrites it before the call is over.
    """

    generator: torch.Generator
    saved: dict[int, Numbers] = field(default_factory=dict)
    after: Numbers | None = None
    contents: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, generator: torch.Generator | None) -> Draws | None:
        """Watch a call that is about to draw.

        None where no other thread may draw from the same generator.
        """
        if generator is None or generator.device.type != "cpu" or threading.active_count() == 1:
            return None
        return cls(generator)

    def state(self) -> Numbers:
        """Return what tells the generator's state."""
        return next_numbers_of(self.generator)

    def at(self, position: int) -> None:
        """Note the generator's state when something is saved."""
        self.saved[position] = self.state()

    def note(self, value: int, tensor: Tensor) -> None:
        """Note the content of a value that nothing overwrites any more."""
        self.contents[value] = content_of(tensor)

    def end(
        self, results: Iterable[tuple[int, int]], made: Sequence[Tensor],
        written: Iterable[tuple[int, int, int]], given: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """Note the generator's state, and the results, after the call.

        Args:
            results: pairs (position among the tensors of the result, value).
            made: the tensors of the result.
            written: triples (position among the arguments, before, after).
            given: the tensors among the arguments.
        """
        self.after = self.state()
        for i, value in results:
            if i < len(made):
                self.note(value, made[i])
        for i, _, new in written:
            self.note(new, given[i])

    def check(self, found: Mapping[int, Tensor], stopped_at: int | None, func: Any) -> None:
        """Compare a rerun, which has just ended, with the first run.

        Args:
            found: what the rerun has made, by value.
            stopped_at: position of the saved tensor after which the rerun ended; None if it was made whole.
            func: what was called.

        Raises:
            Disturbed: the rerun has drawn other numbers.
        """
        if self.state() == (self.after if stopped_at is None else self.saved.get(stopped_at)):
            return
        told = found.keys() & self.contents.keys()
        if not told or any(content_of(found[v]) != self.contents[v] for v in told):
            raise Disturbed(
                f"autoremat cannot draw the numbers of {func} again: another thread drew from the same generator at "
                "the same moment. Give that thread a torch.Generator of its own, or let the step use one"
            )
