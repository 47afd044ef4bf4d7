"""Describes a step to record, and chooses the process that records it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.recording.living import Living
from autoremat.engines.torch.recording.recording import Recording
from autoremat.engines.torch.world.apart import CannotRunApart, can_be_sent, can_run_apart, run_apart
from autoremat.engines.torch.world.modules import scripted_in
from autoremat.engines.torch.world.parallel import Parallel
from autoremat.engines.torch.world.problems import FakesLeft, Scripted


@dataclass(frozen=True)
class Step:
    """A step to record."""

    fn: Any
    modules: Sequence[nn.Module]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    parallel: Parallel
    device: torch.device | str | None
    progress: Progress | None


def apart_or(here: Callable[[], Recording], work: Callable[[Progress | None], Recording], step: Step) -> Recording:
    """Let a child process do the work, or do it here."""
    with suppress(CannotRunApart):
        if can_run_apart():
            done = run_apart(lambda progress: _without_what_cannot_be_sent(work(progress)), step.progress)
            return _with_what_is_here(done)
    if scripted := scripted_in(step.modules):
        raise Scripted(
            f"{scripted} is a ScriptModule: a recording in this process would change it for good, and here none can be "
            "made in another one (CUDA is in use, other threads run, or several processes train); leave "
            "torch.jit.script out of what autoremat checkpoints, or checkpoint the parts around it"
        )
    return here()


def _without_what_cannot_be_sent(recording: Recording) -> Recording:
    """Remove arguments that pickle cannot send.

    The operators that have such arguments cannot be measured then.
    """
    if not can_be_sent(recording):
        for op in recording.ops:
            if not can_be_sent(op.signature):
                op.signature = None
        recording.calls_with_numbers = [c for c in recording.calls_with_numbers if can_be_sent(c)]
    return recording


def _with_what_is_here(recording: Recording) -> Recording:
    """Remove calls of operators that this process does not know.

    The step has defined them in the child, while it ran.
    """
    for op in recording.ops:
        if op.signature is not None and op.signature.func is None:
            op.signature = None
    recording.calls_with_numbers = [c for c in recording.calls_with_numbers if c.func is not None]
    return recording


def refuse_left(living: Living) -> None:
    """Raise if somebody still holds fake tensors of the recording.

    Nothing could be trained with them.
    """
    if holders := living.holders():
        raise FakesLeft(
            f"after the step was recorded on fake tensors, one is still held by {'; one by '.join(holders)}. A step "
            "that used it would train nothing. Call the step once before autoremat does, so that what it caches is "
            "there, or keep the cache in an attribute of a module"
        )
