"""What ``torch.utils.checkpoint`` and autoremat make of steps that are more than arithmetic: cases and outcomes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.engines.torch.compare import World, at_the_floor, observe, same, seeded
from tests.engines.torch.torch_checkpoint import FORMS

ROWS, WIDTH, STEPS = 16, 4, 2
AUTOREMAT = "autoremat"
COLUMNS = (*FORMS, AUTOREMAT)


@dataclass(frozen=True)
class Outcome:
    """What became of two steps.

    Attributes:
        kind: "right": all as in plain training; "plainly": so, too, without checkpointing and with a warning; "error";
            "twice": something was counted or updated twice; "silent": other numbers than in plain training, no error.
        message: of the error or the warning.
    """

    kind: str
    message: str = ""


def outcome(build: Callable[[], World], column: str) -> Outcome:
    """Train plainly and in the way of a column, and compare everything to the last bit."""
    plain = observe(world := seeded(build), world.target, STEPS)
    ran, messages = -1, list[str]()
    try:
        if column == AUTOREMAT:
            got, stats, messages = at_the_floor(build, STEPS)
            ran = stats.reruns
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = observe(world := seeded(build), partial(FORMS[column], world.target), STEPS)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
        return Outcome("error", str(error))
    wrong = [(a, b) for (_, a), (_, b) in zip(got, plain, strict=True) if not same(a, b)]
    if any(is_double(a, b) for a, b in wrong):
        return Outcome("twice")
    if wrong:
        return Outcome("silent")
    if not ran:
        return Outcome("plainly" if messages else "nothing ran again", messages[0] if messages else "")
    return Outcome("right")


def is_double(got: Any, plain: Any) -> bool:
    """Whether this is a count, and twice what it should be."""
    if isinstance(plain, Tensor) and not plain.is_floating_point() and plain.numel() == 1:
        return int(got) == 2 * int(plain) > 0
    return isinstance(plain, int) and got == 2 * plain > 0


# ---- ways to train ---------------------------------------------------------------------------------------------------


def inputs() -> Tensor:
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def once(call: Any) -> Any:
    x = inputs()
    y = call(x)
    y.square().sum().backward()
    return y, x.grad


def twice_over_a_retained_graph(call: Any) -> Any:
    x = inputs()
    loss = call(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return loss, x.grad


def twice_differentiated(call: Any) -> Any:
    x = inputs()
    (gradient,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    return gradient, x.grad


def by_autograd_grad(call: Any) -> Any:
    x = inputs()
    return torch.autograd.grad(call(x).square().sum(), x)


def input_without_gradient(call: Any) -> Any:
    y = call(torch.randn(ROWS, WIDTH))
    if y.requires_grad:
        y.square().sum().backward()
    return y


def by_torch_func(call: Any) -> Any:
    return torch.func.grad(lambda x: call(x).square().sum())(torch.randn(ROWS, WIDTH))


def vmapped(call: Any) -> Any:
    x = inputs()
    y = torch.vmap(call)(x)
    y.square().sum().backward()
    return y, x.grad


def then_changed(pass_on: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any], Any]:
    """A step in which a tensor that autograd does not save is changed after the call."""

    def step(call: Any) -> Any:
        x, shift = inputs(), torch.randn(WIDTH)
        y = pass_on(call, x, shift)
        shift.add_(1)
        y.square().sum().backward()
        return y, x.grad

    return step


# ---- functions and modules -------------------------------------------------------------------------------------------


def smooth(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x.sin().exp()
    return x


def shifted(x: Tensor, shift: Any) -> Tensor:
    shift = shift[0] if isinstance(shift, list) else shift
    for _ in range(3):
        x = (x + shift).sin().tanh()
    return x


def layers(*beside: nn.Module) -> nn.Sequential:
    """Two blocks of a linear layer, whatever is asked for, and a function."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), *beside, nn.Linear(WIDTH, WIDTH), nn.Tanh())


class ReadsTwice(torch.autograd.Function):
    """The sine of something saved, which the backward looks up twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        (again,) = ctx.saved_tensors
        return gradient * (x + again).div(2).cos()


class Scale(nn.Module):
    """Multiplies with a buffer that every forward has changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(1.5)
        return (x * self.scale).sin()


class Shift(nn.Module):
    """Adds a buffer, which every forward changes in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = (x + self.shift).sin()
        self.shift.mul_(1.5)
        return y


class Grow(nn.Module):
    """Keeps what it has seen of late: a buffer with one more row at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x[:1].detach()])
        return (x.unsqueeze(1) * self.seen).sin().sum(1)


class Replace(nn.Module):
    """Multiplies with a buffer that every forward replaces by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 1.5
        return (x * self.scale).sin()


class Gates(nn.Module):
    """A recurrent cell, whose kernels change chunks of a matrix product in place."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x.sin(), x.cos()).sin()
        return (h.exp() * h).sin() * h.cos()


# ---- worlds ----------------------------------------------------------------------------------------------------------


def with_generator() -> World:
    generator = torch.Generator().manual_seed(3)

    def fn(x: Tensor) -> Tensor:
        for _ in range(3):
            x = (x * torch.rand(WIDTH, generator=generator)).sin()
        return x

    return World(fn, once, extra=lambda: generator)


def with_numbers(draw: Callable[[], float]) -> World:
    def fn(x: Tensor) -> Tensor:
        for _ in range(3):
            x = (x * draw()).sin()
        return x

    return World(fn, once)


def other_values_every_time() -> World:
    calls = []

    def fn(x: Tensor) -> Tensor:
        calls.append(None)
        for _ in range(3):
            x = (x * len(calls)).sin()
        return x

    return World(fn, once)


def closure_changed() -> World:
    box: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        return shifted(x, box[0])

    def pass_on(call: Any, x: Tensor, shift: Tensor) -> Tensor:
        box[:] = [shift]
        return call(x)

    return World(fn, then_changed(pass_on))


def custom_function() -> World:
    return World(lambda x: ReadsTwice.apply(x.sin().exp()).sin(), once)


def hooks(inside: bool) -> World:
    counts = {"before": 0, "after": 0}
    model = layers()

    def count(which: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[which] += 1

        return hook

    hooked = model[0] if inside else model
    hooked.register_forward_pre_hook(count("before"))
    hooked.register_forward_hook(count("after"))
    return World(model, once, extra=lambda: dict(counts))


CASES: dict[str, Callable[[], World]] = {
    "batch norm: running statistics, `num_batches_tracked`": lambda: World(layers(nn.BatchNorm1d(WIDTH)), once),
    "numbers from a `torch.Generator` of one's own": with_generator,
    "numbers from Python's `random`": lambda: with_numbers(random.random),
    "numbers from NumPy": lambda: with_numbers(lambda: float(np.random.rand())),
    "a function that computes something else at every call": other_values_every_time,
    "a positional tensor changed in place after the call": lambda: World(
        shifted, then_changed(lambda call, x, shift: call(x, shift))
    ),
    "a keyword tensor changed in place after the call": lambda: World(
        shifted, then_changed(lambda call, x, shift: call(x, shift=shift))
    ),
    "a tensor in a list changed in place after the call": lambda: World(
        shifted, then_changed(lambda call, x, shift: call(x, [shift]))
    ),
    "a tensor in a closure changed in place after the call": closure_changed,
    "a buffer changed in place before it is read": lambda: World(layers(Scale()), once),
    "a buffer changed in place after it is read": lambda: World(layers(Shift()), once),
    "a buffer replaced by another tensor": lambda: World(layers(Replace()), once),
    "a buffer that grows": lambda: World(layers(Grow()), once),
    "`nn.GRUCell`: chunks of a matrix product changed in place": lambda: World(Gates(), once),
    "double backward": lambda: World(layers(), twice_differentiated),
    "backward twice with `retain_graph`": lambda: World(layers(), twice_over_a_retained_graph),
    "`torch.autograd.grad`": lambda: World(smooth, by_autograd_grad),
    "no input requires grad, parameters do": lambda: World(layers(), input_without_gradient),
    "a custom `Function` that reads `ctx.saved_tensors` twice": custom_function,
    "forward hooks of the module itself": lambda: hooks(inside=False),
    "forward hooks of a module inside": lambda: hooks(inside=True),
    "`torch.func.grad` around": lambda: World(smooth, by_torch_func),
    "`torch.vmap` around, then backward": lambda: World(smooth, vmapped),
}
"""Title: what makes a fresh world."""


def outcomes_of(title: str) -> dict[str, Outcome]:
    """The outcome of a case by column."""
    return {column: outcome(CASES[title], column) for column in COLUMNS}


def row(title: str, found: dict[str, Outcome]) -> str:
    """A row of the table in docs/beside-checkpoint.md."""
    return f"| {title} | " + " | ".join(cell(column, found[column]) for column in COLUMNS) + " |"


def cell(column: str, found: Outcome) -> str:
    """One outcome in a word; what autoremat raises on purpose is a refusal."""
    if column == AUTOREMAT and found.kind == "error":
        return "refused"
    return {"plainly": "right, run plainly", "silent": "**silent**", "twice": "**twice**"}.get(found.kind, found.kind)
