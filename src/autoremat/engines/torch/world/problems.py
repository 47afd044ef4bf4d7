"""What no recording can deal with, in words; and what a step must not do inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch.optim.optimizer import register_optimizer_step_pre_hook


class UnusableInput(ValueError):
    """Something about the model or its inputs that no recording can deal with; the message says what to do."""


class NothingDifferentiable(UnusableInput):
    """The callable returned nothing that a backward pass could start from."""


class TrainsInside(UnusableInput):
    """The callable runs its own backward pass or optimizer."""


class Scripted(UnusableInput):
    """A ScriptModule would have to be recorded in this process, which would change it."""


class FakesLeft(UnusableInput):
    """Something of the user's holds fake tensors after a recording in this process."""


NOTHING: Final = (
    "the callable returned nothing that requires grad, so there is no backward pass to plan for; return the loss (or "
    "the model's output), and check that some parameter has requires_grad=True"
)
"""What is told of a step without a backward pass."""


def refuse_training(has_trained: object, error: Exception | None = None) -> None:
    """Raise if gradients came up within the callable."""
    if has_trained:
        raise TrainsInside(
            "the callable runs the backward pass inside, and autoremat plans the one that follows: return the loss "
            "from the callable, and call backward() and the optimizer outside, after it"
        ) from error


@contextmanager
def no_optimizer() -> Iterator[None]:
    """Within this block and in this thread, no optimizer takes a step: it would be one on fake gradients."""
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
