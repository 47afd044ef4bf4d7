"""The script of a plan: what the tape prepares, keeps, drops, reruns.

It is pure data but for the functions that are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from autoremat.engines.torch.eager.away import Move
from autoremat.engines.torch.eager.composite import Composite
from autoremat.engines.torch.eager.path import Call


@dataclass(frozen=True, slots=True)
class Rerun:
    """Run a call once more, then drop some values.

    Attributes:
        call: which.
        install: values that it makes and that stay for a while.
        drops: values to drop afterwards.
    """

    call: int
    install: frozenset[int]
    drops: frozenset[int]


@dataclass(frozen=True, slots=True)
class Act:
    """What to do when the backward asks for a pack.

    First come the reruns, then the answer, then the drop.

    Attributes:
        pack: number of the pack.
        value: that it stands for.
        reruns: calls to rerun before.
        drop: whether the value goes afterwards.
        moves: what goes to the tier or comes back, ahead of all that.
        is_within: whether a pass within the forward asks.
    """

    pack: int
    value: int
    reruns: tuple[Rerun, ...]
    drop: bool
    moves: tuple[Move, ...] = ()
    is_within: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What the plan has to do at a call.

    Attributes:
        call: of the path.
        ready: be ready to rerun it.
        hold: values that it makes and the tape itself holds.
        stops: values after which a rerun may end, once they have been saved inside it.
        hooked: something is to be done about what autograd saves in it.
    """

    call: Call
    ready: bool
    hold: frozenset[int]
    stops: frozenset[int]
    hooked: bool = True
    values: dict[int, int] = field(default_factory=dict)
    """The values that it reads, by position among the tensors given."""
    written: frozenset[int] = frozenset()
    """Positions of what it overwrites."""
    spare: bool = False
    """Be ready to rerun it off the path, unlike the plan."""
    draws_only: bool = False
    """Only draw, while no other thread draws.

    Another thread may be noting what it draws.
    """
    moves: tuple[Move, ...] = ()
    """What goes to the tier or comes back ahead of the call."""


@dataclass(frozen=True)
class Script:
    """What the tape follows.

    Attributes:
        funcs: what is called, in order.
        works: for every call what there is to do, if anything.
        packs: for everything that autograd saves: None to keep it as it is, or the value whose memory may go.
        asked: packs that are kept, and at which something is to be done when they are asked for.
        acts: what to do at requests of the backward, in order.
        kept: values of packs that are kept and that the backward asks for.
        hold: values that the tape itself holds.
        hold_at: those of them made and saved inside a call, by the number of a pack that is kept.
        at_end: values in memory at the end of the forward, which somebody asks for or reads later.
        twice: calls for whose immediate rerun the budget has room.
        budget_bytes: the budget; None: a step off the path may take what it likes.
        beside_bytes: the most that is taken besides the values that the tape holds: in the forward, then from each
            request of the backward to the next.
        asked_bytes: the part of that taken at the moment of each request, when calls may be rerun for it; in the
            forward, the temporaries of kernels.
        gradient_bytes: the part of that, each time, which is gradients of parameters at least: these grow with no
            input.
        fixed_bytes: what is always there.
        where: for every call its operator, module and line, for messages.
        loose: something is to be done about what autograd saves outside of all calls, for a custom function.
        numels: for every call the elements of the tensor that it gives; for a larger one there is no plan.
        saved_bytes: what autograd itself keeps, after so many calls.
        held_bytes: what is in memory between forward and backward, besides what is always there: under the plan, and in
            plain training.
        waiting_bytes: what is in memory on top of that, while the backward goes through another call.
        last: number of the pack that is asked for last.
        stops: values that a rerun of their call can hand out before its end.
        spare_works: in place of ``works``, where the path may be left: whatever may be rerun is prepared.
        spare_seconds: what that takes: an estimate.
        packed: for everything that autograd saves the value, if it has one.
        costs: for every call a rerun's seconds, and the most bytes that it takes on top of what is there.
        composites: by their first call, functions made of others at whose calls there is nothing to do.
        away: values that are in the tier for a while.
        sent_bytes: what goes there in all.
    """

    funcs: tuple[Callable[..., Any], ...]
    works: tuple[Work | None, ...]
    packs: tuple[int | None, ...]
    asked: frozenset[int]
    acts: tuple[Act, ...]
    hold: frozenset[int]
    kept: frozenset[int] = frozenset()
    at_end: frozenset[int] = frozenset()
    hold_at: dict[int, int] = field(default_factory=dict)
    twice: frozenset[int] = frozenset()
    budget_bytes: int | None = None
    beside_bytes: tuple[int, ...] = (0,)
    asked_bytes: tuple[int, ...] = (0,)
    gradient_bytes: tuple[int, ...] = (0,)
    fixed_bytes: int = 0
    where: tuple[str, ...] = ()
    loose: bool = False
    numels: tuple[float, ...] = ()
    saved_bytes: tuple[int, ...] = (0,)
    held_bytes: tuple[int, int] = (0, 0)
    waiting_bytes: int = 0
    last: int = -1
    stops: frozenset[int] = frozenset()
    spare_works: tuple[Work | None, ...] = ()
    spare_seconds: float = 0.0
    packed: tuple[int | None, ...] = ()
    costs: tuple[tuple[float, int], ...] = ()
    composites: dict[int, Composite] = field(default_factory=dict)
    away: frozenset[int] = frozenset()
    sent_bytes: int = 0

    @cached_property
    def n_acts_within(self) -> int:
        """Count the acts of passes within the forward; these are the first."""
        return sum(act.is_within for act in self.acts)

    @cached_property
    def n_reruns(self) -> int:
        """Count the reruns of a step."""
        return sum(len(act.reruns) for act in self.acts)


def elsewhere(script: Script, room_bytes: float, gradient_bytes: int) -> Script:
    """Adapt a script's account to a step of other calls.

    What such a step takes besides its values is about what a step of the script takes.

    Args:
        script: whose account it is.
        room_bytes: room besides what is always there.
        gradient_bytes: of parameters that have no gradient yet.
    """
    fixed, gradients = script.fixed_bytes, script.gradient_bytes
    beside, asked = (
        tuple([made - fixed - known + gradient_bytes for made, known in zip(all_made, gradients, strict=False)])
        for all_made in (script.beside_bytes, script.asked_bytes)
    )
    return replace(
        script, fixed_bytes=0, saved_bytes=(0,), gradient_bytes=(gradient_bytes,) * len(beside),
        beside_bytes=(*asked[:1], *beside[1:]), asked_bytes=asked,
        budget_bytes=None if script.budget_bytes is None or room_bytes == math.inf else int(room_bytes),
    )  # fmt: skip
