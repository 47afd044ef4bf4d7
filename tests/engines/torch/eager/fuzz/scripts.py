"""Programs as data: instructions, steps, ways; their ``repr`` is Python that makes them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTH = 8


# ---- a script as data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Do:
    """``pool[to] = op(pool[a], pool[b])``; ``k`` chooses among variants."""

    op: str
    to: int
    a: int
    b: int = 0
    k: int = 0


@dataclass(frozen=True)
class If:
    """A branch that the numbers in a tensor decide."""

    on: int
    then: tuple[Instruction, ...]
    otherwise: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class In:
    """A region: instructions under a context manager of ``REGIONS``."""

    region: str
    body: tuple[Instruction, ...]


Instruction = Do | If | In


@dataclass(frozen=True)
class Step:
    """One training step: how the forward is used (``USES``), on which inputs, in which mode."""

    use: str = "once"
    rows: int = 4
    sign: int = 1
    training: bool = True
    input_grad: bool = False
    k: int = 0


@dataclass(frozen=True)
class Way:
    """How autoremat runs it.

    ``nothing``: whatever may be computed again is, again and again; ``random``: values drop at random, ``seed``;
    ``budget``: the best plan for a budget, a ``share`` of the way from the floor to the plain peak; ``online``: off the
    path from the first operator on, nothing allowed; ``measured``: as ``budget``, and the peak is measured, too. Where
    three does not divide ``seed``, it is recorded on real tensors, which is faster.
    """

    mode: str = "nothing"
    seed: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Script:
    """A whole program: the forward's body; what it returns (``RETURNS``) beside a loss of the whole pool; the steps."""

    body: tuple[Instruction, ...]
    returns: str = "loss"
    slots: tuple[int, ...] = (2,)
    steps: tuple[Step, ...] = (Step(), Step())
    way: Way = field(default_factory=Way)


def leaves_of(body: tuple[Instruction, ...]) -> Iterator[Do]:
    """The instructions of a body, those in branches and regions included."""
    for i in body:
        if isinstance(i, Do):
            yield i
        elif isinstance(i, If):
            yield from leaves_of(i.then + i.otherwise)
        else:
            yield from leaves_of(i.body)
