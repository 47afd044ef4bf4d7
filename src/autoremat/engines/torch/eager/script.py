"""The script of a plan: what the tape prepares, keeps and drops, and what it makes again when.

Pure data but for the functions that are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from autoremat.engines.torch.eager.composite import Composite
from autoremat.engines.torch.eager.path import Call


@dataclass(frozen=True, slots=True)
class Rerun:
    """Make a call again, then let go of some values.

    Attributes:
        call: which.
        install: values that it makes and that stay for a while.
        drops: values to let go of afterwards.
    """

    call: int
    install: frozenset[int]
    drops: frozenset[int]


@dataclass(frozen=True, slots=True)
class Act:
    """What to do when the backward asks for what a pack stands for: first the reruns, then the answer, then the drop.

    Attributes:
        pack: number of the pack.
        value: that it stands for.
        reruns: calls to make again before.
        drop: whether the value leaves afterwards.
    """

    pack: int
    value: int
    reruns: tuple[Rerun, ...]
    drop: bool


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do at a call that the plan has something to do with.

    Attributes:
        call: of the path.
        ready: be ready to make it again.
        hold: values that it makes and the tape itself holds on to.
        stops: values after which a run of it may end, once they have been saved inside it.
        hooked: something is to be done about what autograd saves in it.
    """

    call: Call
    ready: bool
    hold: frozenset[int]
    stops: frozenset[int]
    hooked: bool = True
    values: dict[int, int] = field(default_factory=dict)
    """What it reads: by position among the tensors given, the value."""
    written: frozenset[int] = frozenset()
    """Positions of what it overwrites."""
    spare: bool = False
    """Be ready to make it again should the path be left, though the plan does not."""
    draws_only: bool = False
    """There is nothing to do but to draw while no other thread does: one may be noting what it draws."""


@dataclass(frozen=True)
class Script:
    """What the tape follows.

    Attributes:
        funcs: what is called, in order.
        works: for every call what there is to do, if anything.
        packs: for everything that autograd saves: None to keep it as it is, or the value whose memory may go.
        asked: packs that are kept, and at which something is to be done when they are asked for.
        acts: what to do at requests of the backward, in order.
        kept: values of packs that are kept.
        hold: values that the tape itself holds on to.
        hold_at: of those the ones made and saved inside a call, by the number of a pack that is kept.
        twice: calls for whose second run, right after the first, the budget has room.
        budget_bytes: the budget; None: a step off the path may take what it likes.
        beside_bytes: what anything but the values that the tape holds takes at most: in the forward, then from each
            request of the backward to the next.
        asked_bytes: of that what is taken at the moment of each request, when calls may be made again for it; in the
            forward, what kernels take that give nothing of it.
        gradient_bytes: of that at least so much, each time, are gradients of parameters: these grow with no input.
        fixed_bytes: what is always there.
        watch: the forward is known to write memory in ways that torch does not see.
        where: for every call its operator, module and line, for messages.
        loose: something is to be done about what autograd saves outside of all calls, for a custom function.
        numels: for every call the elements of the tensor that it gives; for a larger one there is no plan.
        saved_bytes: what autograd itself keeps, after so many calls.
        held_bytes: what there is between forward and backward, beside what is always there; in plain training.
        waiting_bytes: what there is beside that, while the backward goes through another call.
        last: number of the pack that is asked for last.
        spare_works: in place of ``works``, where the path may be left: whatever may be made again is prepared.
        spare_share: what that takes, as a share of the time of plain training: an estimate.
        packed: for everything that autograd saves the value, if it has one.
        costs: for every call the seconds of another run, and the bytes of what it makes and takes beside.
        composites: by their first call, functions made of others at whose calls there is nothing to do.
    """

    funcs: tuple[Callable[..., Any], ...]
    works: tuple[Work | None, ...]
    packs: tuple[int | None, ...]
    asked: frozenset[int]
    acts: tuple[Act, ...]
    hold: frozenset[int]
    kept: frozenset[int] = frozenset()
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
    spare_share: float = 0.0
    packed: tuple[int | None, ...] = ()
    costs: tuple[tuple[float, int], ...] = ()
    composites: dict[int, Composite] = field(default_factory=dict)


def elsewhere(script: Script, room_bytes: float, gradient_bytes: int) -> Script:
    """The account of a step of other calls: what it takes beside its values is about what a step of these takes.

    Args:
        script: of these.
        room_bytes: that there are beside what is always there.
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
