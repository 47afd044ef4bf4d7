"""The path of a forward: its calls in order, and saved tensors.

The first step of a kind of input makes the path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.composite import Composite

Pair = tuple[int, int]


def n_elements(out: Any) -> int:
    """Count the elements of tensors in a result, nested tuples included."""
    if isinstance(out, Tensor):
        return out.numel()
    return sum(map(n_elements, out)) if isinstance(out, (tuple, list)) else 0


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the path.

    Values have the numbers of the recording; positions count tensors.

    Attributes:
        func: what is called.
        reads: pairs (position among the tensors given, value) of values made in the step.
        results: pairs (position among the tensors of the result, value) of what it makes.
        saved: pairs (position among what it saves, value) of what is made and saved inside it.
        written: triples (position among the tensors given, value before, value after) of what it overwrites.
        effects: positions of what it overwrites that the step did not make.
        statistics: positions of running statistics.
        random: it draws from a generator.
        uninitialised: its result is whatever the memory held before.
        leaves: it may have left unseen effects.
        packs: number of the first tensor that autograd saves in it, and of the first one after it.
        numel: elements of the tensors that it gives.
    """

    func: Callable[..., Any]
    reads: tuple[Pair, ...]
    results: tuple[Pair, ...]
    saved: tuple[Pair, ...]
    written: tuple[tuple[int, int, int], ...]
    effects: tuple[int, ...]
    statistics: tuple[int, ...]
    random: bool
    uninitialised: bool
    leaves: bool
    packs: tuple[int, int]
    numel: int = 0

    @property
    def overwrites_outside(self) -> tuple[int, ...]:
        """Positions of what it overwrites from outside, but for statistics."""
        return self.effects[len(self.statistics) :]


@dataclass(frozen=True)
class Path:
    """All calls of a forward.

    Attributes:
        calls: in order.
        packed: for everything that autograd saved, in order, the value; None for what is from outside or cannot go.
        asks: what the passes asked for, in the order of the program's ``unpack`` ops: numbers of packs, -1 where the
            real step has no such pack.
        composites: functions of torch that were looked into, with their sizes; known for recorded sizes only.
    """

    calls: tuple[Call, ...]
    packed: tuple[int | None, ...]
    asks: tuple[int, ...]
    composites: tuple[Composite, ...] = field(default=(), compare=False)

    def numels(self) -> tuple[int, ...]:
        """Return, for every call, the number of elements that it gives."""
        return tuple(call.numel for call in self.calls)

    def with_numels(self, numels: Sequence[int]) -> Path:
        """Return the same calls with other numbers of elements."""
        calls = tuple(replace(c, numel=n) for c, n in zip(self.calls, numels, strict=True))
        return replace(self, calls=calls, composites=())

    def is_like(self, other: Path) -> bool:
        """Tell whether another path differs in numbers of elements only."""
        if (self.packed, self.asks, len(self.calls)) != (other.packed, other.asks, len(other.calls)):
            return False
        return self == other.with_numels(self.numels())
