"""Accelerate needs no adapter: prepare first, then checkpoint; the same bits, and within the budget."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import measured_peak
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from tests.integrations.meter import SCALARS

pytestmark = pytest.mark.slow
WIDTH, ROWS = 32, 128


def network() -> nn.Module:
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    return nn.Sequential(*[layer() for _ in range(4)])


def train(order: str, precision: str) -> tuple[list[Any], list[int], list[int], Any]:
    """Six batches, two for each step of the optimizer: the numbers, the peaks of the last two, and their budgets."""
    accelerate.state.AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = network()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: Any = {"budget": 0.8, "time_limit_seconds": 1.0}
    if order == "checkpoint, prepare":
        autoremat.checkpoint(model, optimizer=optimizer, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    if order == "prepare, checkpoint":
        autoremat.checkpoint(model, optimizer=optimizer, **options)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    call = autoremat.checkpoint(loss_of, optimizer=optimizer, **options) if order == "prepare, loss" else loss_of
    seen: list[Any] = []
    peaks: list[int] = []
    budgets: list[int] = []
    checkpointed = {"plain": None, "prepare, loss": call}.get(order, model)
    for k in range(6):
        x, y = torch.randn(2, ROWS, WIDTH)

        def step(x: Tensor = x, y: Tensor = y) -> None:
            with accelerator.accumulate(model):
                loss = call(x, y)
                accelerator.backward(loss)
                seen.append(loss.detach().clone())
                if accelerator.sync_gradients:
                    seen.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
                optimizer.step()
                optimizer.zero_grad()

        if k < 4:  # two kinds of input, planned at their first call, and again at their second
            step()
        else:
            peaks.append(measured_peak(step, model, optimizer.optimizer, x, y))
            if checkpointed is not None:
                budgets.append(autoremat.stats(checkpointed).plan.budget_bytes)
    seen += [*model.state_dict().values(), torch.get_rng_state()]
    return seen, peaks, budgets, None if checkpointed is None else autoremat.stats(checkpointed)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ["prepare, checkpoint", "prepare, loss", "checkpoint, prepare"])
def test_accelerate_is_exact_and_within_the_budget(order: str, precision: str) -> None:
    plain, plain_peaks, _, _ = train("plain", precision)
    mine, peaks, budgets, stats = train(order, precision)
    assert len(mine) == len(plain)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(mine, plain, strict=True))
    assert stats.reruns > 0
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert max(peaks) < max(plain_peaks)
    if order == "prepare, loss":  # then nothing else is outside
        assert all(peak <= budget + SCALARS for peak, budget in zip(peaks, budgets, strict=True))


def test_the_optimizer_of_accelerate_is_looked_through() -> None:
    """Its ``param_groups`` are those of the optimizer within: a copy with fake ones would have replaced them."""
    accelerate.state.AcceleratorState._reset_state(True)
    model = network()
    plain = torch.optim.AdamW(model.parameters())
    prepared = accelerate.Accelerator(cpu=True).prepare(plain)
    groups = plain.param_groups
    assert optimizer_bytes(prepared) == optimizer_bytes([prepared]) == optimizer_bytes(plain)
    assert plain.param_groups is groups
    assert all(a is b for a, b in zip(groups[0]["params"], model.parameters(), strict=True))
