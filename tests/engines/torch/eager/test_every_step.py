"""Within the budget from the first step on: gradients that accumulate, losses that keep memory, measuring itself."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import autoremat
from autoremat.engines.torch.eager.planning import Planning
from autoremat.engines.torch.operators import timing
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.optimizer import optimizer_bytes

WIDTH, ROWS = 32, 128

SCALARS_BYTES = 256
"""What numbers that Python takes from tensors may take beside."""


def network() -> nn.Module:
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    return nn.Sequential(*[layer() for _ in range(2)])


LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.l1_loss, F.binary_cross_entropy,
]  # fmt: skip


@pytest.mark.one_in(5)
@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda f: f.__name__)
def test_a_loss_keeps_the_memory_of_its_kernel(
    loss_of: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some kernels leave one number in as many bytes as the prediction takes, for as long as somebody has the loss."""
    monkeypatch.setattr(timing, "_CACHE_BYTES", 0)
    model, x, y = nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(ROWS, WIDTH), torch.rand(ROWS, WIDTH)

    def step() -> Tensor:
        return loss_of(model(x).tanh().square(), y)

    def train() -> None:
        loss = step()
        loss.backward()

    plan = autoremat.plan(step, budget=1.0, timing="measure")
    assert account(train, resident(model, x, y)).peak_bytes == plan.plain_peak_bytes


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize(
    ("precision", "budget", "looks"),
    [
        pytest.param(torch.float32, 350_000, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 330_000, False, marks=pytest.mark.slow),
        (torch.float32, 350_000, True),
    ],
)
def test_every_micro_step_is_within_the_budget(
    precision: torch.dtype, budget: int, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first with its recording, its measuring and its self-check, the second under the plan that is found first."""
    monkeypatch.setattr(timing, "_MEASURED", {})
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    state_bytes = optimizer_bytes(optimizer).state

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            assert not looks or x.abs().sum() > 0  # needs the numbers
            return F.mse_loss(model(x), y)

    call = autoremat.checkpoint(loss_of, budget=budget, optimizer=optimizer, time_limit_seconds=0.1)
    for k in range(6):
        x, y = torch.randn(2, ROWS, WIDTH)

        def step(x: Tensor = x, y: Tensor = y) -> None:
            loss = call(x, y)  # alive until the backward is over
            loss.backward()

        peak = account(step, resident(model, x, y) + state_bytes).peak_bytes
        plan = autoremat.stats(call).plan
        assert plan is not None
        assert max(plan.peak_bytes, peak) <= budget, f"step {k}"
        assert k < 4 or abs(peak - plan.peak_bytes) <= SCALARS_BYTES  # of both kinds, two steps are compared
        if k % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert autoremat.stats(call).reruns > 0
    assert autoremat.stats(call).deviations == 0


@pytest.mark.slow
@pytest.mark.guard
def test_a_thread_beside_does_not_change_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another thread may draw, too, random calls that run again are checked; that takes no memory."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        test_every_micro_step_is_within_the_budget(torch.float32, 350_000, True, monkeypatch)
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.guard
def test_what_a_first_step_makes_on_demand_ends_where_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also calls that the plan, here the greedy's, does not make again: they took their output, too."""
    solve = Planning.solve
    monkeypatch.setattr(Planning, "solve", lambda *args: solve(*args[:4]))
    test_a_thread_beside_does_not_change_the_peak(monkeypatch)


def test_operators_are_measured_under_a_profiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It allows no other one in its thread; estimates in place of measurements would have been remembered for good."""
    monkeypatch.setattr(timing, "_CACHE_BYTES", 0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)), torch.randn(ROWS, WIDTH)

    def memory() -> tuple[list[int], list[int]]:
        monkeypatch.setattr(timing, "_MEASURED", {})
        program = autoremat.plan(lambda: F.mse_loss(model(x), x), budget=1.0, timing="measure").program
        return [op.scratch_bytes for op in program.ops], [v.nbytes for v in program.values]

    with profile(activities=[ProfilerActivity.CPU]):
        watched = memory()
    assert watched == memory()
    assert any(watched[0])


class Reversible(torch.autograd.Function):
    """Gives back the memory of its input, as reversible blocks do, and computes it from the output in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(x @ w)
            h = torch.tanh(torch.tanh(h) * 2)
            y = x + h.mean(1, keepdim=True)
        ctx.w, ctx.x = w, x.detach()
        ctx.kept = x.detach().clone().half()
        x.untyped_storage().resize_(0)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = ctx.kept.float().requires_grad_()
            y = x + torch.tanh(torch.tanh(torch.tanh(x @ ctx.w)) * 2).mean(1, keepdim=True)
            return torch.autograd.grad(y, (x, ctx.w), gradient)


@pytest.mark.slow
@pytest.mark.guard
def test_what_is_handed_out_brings_back_nothing_that_nobody_waits_for() -> None:
    """What a call without gradients made on the way to what stays is not made again to be kept for nobody."""
    weights = [torch.randn(WIDTH, 4 * WIDTH, requires_grad=True) for _ in range(4)]
    head, x = nn.Sequential(*[nn.Linear(WIDTH, WIDTH), nn.Tanh()] * 4), torch.randn(4 * ROWS, WIDTH)

    def loss() -> Tensor:
        h = x * 1.0
        for w in weights:
            h = Reversible.apply(h, w)
        return head(h).square().mean()

    plain = account(lambda: loss().backward()).peak_bytes
    for p in (*head.parameters(), *weights):
        p.grad = None
    call = autoremat.checkpoint(loss, budget=1.0)
    peaks = []
    for _ in range(3):
        peaks.append(account(lambda: call().backward()).peak_bytes)
        for p in (*head.parameters(), *weights):
            p.grad = None
    assert max(peaks) <= plain


@pytest.mark.parametrize("n_steps", [1, 2])
def test_gradients_and_inputs_of_a_step_die_with_it(n_steps: int) -> None:
    """Without the garbage collector: what a first step remembers of them would lie in memory for some steps more."""
    model = network()
    checkpointed = autoremat.checkpoint(lambda x: model(x).square().mean(), budget=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    gc.collect()
    gc.disable()
    try:
        for _ in range(n_steps):
            x = torch.randn(ROWS, WIDTH)
            given = [weakref.ref(t) for t in (x, *(p.grad for p in model.parameters()))]
            checkpointed(x).backward()
            del x
            for p in model.parameters():
                p.grad = None
            assert not any(r() is not None for r in given)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
    finally:
        gc.enable()
