"""Errors for steps that no recording can deal with.

Also what must not happen inside a step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch.optim.optimizer import register_optimizer_step_pre_hook


class UnusableInput(ValueError):
    """No recording can deal with the model or its inputs.

    The message says why, and what to do.
    """


class NothingDifferentiable(UnusableInput):
    """The callable returned nothing that a backward pass could start from."""


class TrainsInside(UnusableInput):
    """The callable runs its own backward pass or optimizer."""


class Scripted(UnusableInput):
    """A ScriptModule would be changed by recording it in this process."""


class FakesLeft(UnusableInput):
    """Something of the user's code still holds fake tensors after a recording."""


NOTHING: Final = (
    "the callable returned nothing that requires grad, so there is no backward pass to plan for; return the loss (or "
    "the model's output), and check that some parameter has requires_grad=True"
)
"""The message for a step without a backward pass."""


def refuse_training(has_trained: object, error: Exception | None = None) -> None:
    """Raise if gradients appeared within the callable."""
    if has_trained:
        raise TrainsInside(
            "the callable runs the backward pass inside, and autoremat plans the one that follows: return the loss "
            "from the callable, and call backward() and the optimizer outside, after it"
        ) from error


@contextmanager
def no_optimizer() -> Iterator[None]:
    """Refuse optimizer steps in this thread: gradients are fake here."""
    thread = threading.get_ident()

    def refuse(optimizer: Any, *_: Any) -> None:
        if threading.get_ident() == thread:
            raise TrainsInside(
                f"the callable runs the optimizer ({type(optimizer).__name__}) inside, and with it the backward pass: "
                "return the loss from the callable, and call backward() and the optimizer's step() outside, after it"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
