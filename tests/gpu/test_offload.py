"""Values moved to pinned memory of the host: exact when the copies are far behind, and within the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import autoremat
from autoremat.engines.torch.world.pinned import Pinned, Store

pytestmark = pytest.mark.gpu

CYCLES = 20_000_000
"""Of ``torch.cuda._sleep``: some ten milliseconds, in which a step without a wait would be over."""


def loss_of(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(x).square().mean()


def numbers(model: nn.Module, call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = call()
    loss.backward()
    torch.cuda.synchronize()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("slow", ["out", "in", "both", "neither"])
def test_a_step_is_exact_when_its_copies_are_late(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy stream sleeps ahead of every copy, so whoever does not wait reads what is not there."""
    plain_begun = Store._begun

    def late(self: Store, stream: torch.cuda.Stream, offset: int, storage: torch.UntypedStorage, *, is_out: bool):  # type: ignore[no-untyped-def]
        if slow == "both" or slow == ("out" if is_out else "in"):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
        return plain_begun(self, stream, offset, storage, is_out=is_out)

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Dropout(0.1)) for _ in range(8)]
    model, x = nn.Sequential(*layers).cuda(), torch.randn(8192, 512, device="cuda")
    plain = numbers(model, loss_of(model, x))
    monkeypatch.setattr(Store, "_begun", late)
    call = autoremat.checkpoint(loss_of(model, x), budget=0.6, offload="host")
    for _ in range(3):
        assert all(map(torch.equal, numbers(model, call), plain))
    plan = autoremat.stats(call).plan
    assert plan is not None
    assert plan.schedule.offloads


def test_the_measured_peak_is_within_the_budget() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8))).cuda()
    call = autoremat.checkpoint(loss_of(model, torch.randn(16384, 1024, device="cuda")), budget=0.6, offload="host")
    for _ in range(2):
        numbers(model, call)
    plan = autoremat.stats(call).plan
    assert plan is not None
    model.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    call().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() <= 1.01 * plan.budget_bytes


def test_memory_goes_there_and_back() -> None:
    store = Pinned().open(1 << 20)
    source = torch.arange(1 << 18, dtype=torch.uint8, device="cuda")
    expected = source.clone()
    sent = store.send(source.untyped_storage())
    assert store.wait(sent) is None
    source.zero_()
    target = torch.empty_like(source)
    back = store.fetch(sent, target.untyped_storage())
    assert store.wait(back) is None
    assert torch.equal(target, expected)
