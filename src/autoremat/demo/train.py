"""Trains plainly, by hand and with autoremat, side by side.

By hand is ``torch.utils.checkpoint`` around every block; autoremat has three budgets.

Every variant has its own copy of the model and sees the same batches and the same random numbers. The variants take
turns within every training step, so that a busy machine slows all of them, and extra time is the median of the ratios
to the plain step beside it. Gradients, buffers and the generator's state are compared with the plain run, bit for bit,
after every step. The last step runs under the profiler and gives the memory.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.demo import data, models
from autoremat.engines.torch.world.memory_account import Account, account, resident

BUDGETS = (0.7, 0.5, 0.35)
"""Fractions of the plain peak that the demo plans for."""

_WARM_UP = 2
"""Steps that are not timed: the first one records and plans, the second one fills caches."""

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss.

    Attributes:
        label: its short name.
        name: its sizes too.
        build: makes the model; the same one for the same state of the global generator.
        loss: ``loss(model, x, y)``, a scalar.
        batches: starts an endless iterator over ``(x, y)``.
    """

    label: str
    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batches: Callable[[], Batches]


@dataclass(frozen=True)
class Row:
    """What one variant did.

    Attributes:
        name: what a person calls the variant.
        account: the allocator's own account of the last step.
        time_ratio: median over the timed steps of its seconds over the plain step's seconds.
        same_gradients: every gradient of every step was bit-identical to the plain run's.
        same_state: so were buffers and the random generator's state.
        loss: loss of the last step.
        budget_bytes: what autoremat was given; ``None`` for the others.
        predicted_bytes: the peak that autoremat promised; ``None`` for the others.
        at_floor: the budget asked for was below the floor, so the floor was taken instead.
    """

    name: str
    account: Account
    time_ratio: float
    same_gradients: bool
    same_state: bool
    loss: float
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    at_floor: bool = False

    @property
    def kept_promises(self) -> bool:
        """Tell whether the row is within budget and identical to plain.

        A variant without a budget promises nothing.
        """
        if self.budget_bytes is None:
            return True
        return self.same_gradients and self.same_state and self.account.peak_bytes <= self.budget_bytes


@dataclass(frozen=True)
class Result:
    """All variants of one task; the first row is the plain run."""

    label: str
    name: str
    rows: tuple[Row, ...]


@dataclass
class Shown:
    """What a way of training has shown so far."""

    seconds: list[float] = field(default_factory=list)
    last_loss: float = float("nan")
    same_gradients: bool = True
    same_state: bool = True
    generator_state: Tensor | None = None
    account: Account | None = None


@dataclass
class Variant:
    """One way of training, and what it has shown."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    plain_loss: Loss
    loss: Loss
    budget: float | int | None = None
    at_floor: bool = False
    shown: Shown = field(default_factory=Shown)


def tasks(quick: bool = False) -> tuple[Task, Task]:
    """Make the two tasks of the demo; tiny ones if ``quick``."""
    return _text_task(quick), _digits_task(quick)


def _text_task(quick: bool) -> Task:
    tiny = models.GPTConfig(blocks=3, width=32, heads=2, context=32)
    config, batch = (tiny, 4) if quick else (models.GPTConfig(), 12)
    text = data.stdlib_bytes(max_bytes=200_000 if quick else 8_000_000)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    name = f"GPT, {config.blocks} blocks of width {config.width}, {batch} x {config.context} bytes of Python source"
    return Task("GPT", name, partial(models.GPT, config), loss, partial(data.text_batches, text, batch, config.context))


def _digits_task(quick: bool) -> Task:
    tiny = models.ResNetConfig(widths=(8, 16), blocks_per_stage=1)
    config, batch = (tiny, 16) if quick else (models.ResNetConfig(), 96)
    images, labels = data.digits(size=16 if quick else 32)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    name = f"Pre-activation ResNet, {len(config.widths) * config.blocks_per_stage} blocks, {batch} digits"
    return Task(
        "ResNet", name, partial(models.ResNet, config), loss, partial(data.image_batches, images, labels, batch)
    )


def run_task(task: Task, steps: int, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Result:
    """Train all variants of one task in turns.

    Args:
        task: what to train.
        steps: training steps; the first two are not timed and the last one is measured instead.
        on_step: called after every step with its number and the plain run's loss.

    Raises:
        ValueError: fewer than four steps.
    """
    if steps < _WARM_UP + 2:
        raise ValueError(
            f"the demo needs at least {_WARM_UP + 2} steps, got {steps}; use --steps {_WARM_UP + 2} or more"
        )
    variants = [_variant(task, "plain"), _torch_checkpoint(task), *(_autoremat(task, b) for b in BUDGETS)]
    batches = task.batches()
    for step in range(steps):
        x, y = next(batches)
        first = step % len(variants)
        for variant in variants[first:] + variants[:first]:
            _take_step(variant, x, y, seed=step, first=step == 0, last=step == steps - 1)
        for variant in variants:
            _compare(variant, variants[0])
        on_step(step, variants[0].shown.last_loss)
    return Result(task.label, task.name, tuple(_row(v, variants[0]) for v in variants))


def _variant(task: Task, name: str) -> Variant:
    """Copy the task's model, with its optimizer and loss.

    The model is the same for every variant.
    """
    torch.manual_seed(0)
    model = task.build()

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return task.loss(model, x, y)

    return Variant(name, model, torch.optim.Adam(model.parameters(), lr=1e-3), loss_fn, loss_fn)


def _torch_checkpoint(task: Task) -> Variant:
    variant = _variant(task, "torch checkpoint")
    models.checkpoint_every_block(variant.model)
    return variant


def _autoremat(task: Task, budget: float) -> Variant:
    variant = _variant(task, f"autoremat, {budget:.0%}")
    _set_budget(variant, budget)
    return variant


def _set_budget(variant: Variant, budget: float | int) -> None:
    """Put the loss function under a budget, as a user would.

    With it comes all memory of the step.
    """
    variant.loss = autoremat.checkpoint(variant.plain_loss, budget=budget, optimizer=variant.optimizer)
    variant.budget = budget


def _take_step(variant: Variant, x: Tensor, y: Tensor, *, seed: int, first: bool, last: bool) -> None:
    """Take one step: check it first, measure it last, else time it."""
    variant.optimizer.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    step = partial(_step, variant, x, y)
    start = time.perf_counter()
    if last:
        before = resident(variant.model, variant.optimizer, x, y)
        variant.shown.account = account(step, before)
    elif first:
        _first_step(variant, x, y, seed)
    else:
        step()
    variant.shown.seconds.append(time.perf_counter() - start)
    variant.shown.generator_state = torch.get_rng_state()


def _step(variant: Variant, x: Tensor, y: Tensor) -> None:
    loss = variant.loss(x, y)
    loss.backward()
    variant.optimizer.step()
    variant.shown.last_loss = loss.item()


def _first_step(variant: Variant, x: Tensor, y: Tensor, seed: int) -> None:
    """Record and plan; replace a budget below the floor by it.

    That is known at the end of the forward: what it has drawn, and its batch norms have noted, is taken back.
    """
    before = copy.deepcopy(variant.model.state_dict())
    try:
        _step(variant, x, y)
    except autoremat.InfeasibleBudget as error:
        variant.at_floor = True
        variant.model.load_state_dict(before)
        torch.manual_seed(seed)
        _set_budget(variant, error.floor_bytes)
        _step(variant, x, y)


def _compare(variant: Variant, plain: Variant) -> None:
    pairs = zip(variant.model.parameters(), plain.model.parameters(), strict=True)
    variant.shown.same_gradients &= all(_same_bits(a.grad, b.grad) for a, b in pairs)
    buffers = zip(variant.model.buffers(), plain.model.buffers(), strict=True)
    variant.shown.same_state &= all(_same_bits(a, b) for a, b in buffers)
    variant.shown.same_state &= _same_bits(variant.shown.generator_state, plain.shown.generator_state)


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the last bit, signs of zeros included."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _row(variant: Variant, plain: Variant) -> Row:
    timed = slice(_WARM_UP, -1)
    ratios = [a / b for a, b in zip(variant.shown.seconds[timed], plain.shown.seconds[timed], strict=True)]
    plan = None if variant.budget is None else autoremat.stats(variant.loss).plan
    assert variant.shown.account is not None
    return Row(
        name=variant.name,
        account=variant.shown.account,
        time_ratio=statistics.median(ratios),
        same_gradients=variant.shown.same_gradients,
        same_state=variant.shown.same_state,
        loss=variant.shown.last_loss,
        budget_bytes=plan.budget_bytes if plan else None,
        predicted_bytes=plan.peak_bytes if plan else None,
        at_floor=variant.at_floor,
    )
