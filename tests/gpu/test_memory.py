"""The measured peak on a device is the plan's, in bytes that were requested of the caching allocator.

``requested_bytes`` of ``torch.cuda.memory_stats`` has no rounding: a block is rounded up to 512 bytes, and one above
1 MiB may be handed out with up to 1 MiB that nobody asked for. ``max_memory_allocated`` counts that, a plan does not.
What is there before the step beside parameters, buffers and inputs (cuBLAS workspaces) is taken off both.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig
from autoremat.engines.torch.world.memory_account import resident

pytestmark = pytest.mark.gpu

ROUNDING, LARGE_ROUNDING = 512, 1 << 20


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def release() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def gpt() -> tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]]:
    model = GPT(GPTConfig(blocks=4, width=256, heads=4, context=256, dropout=0.1)).cuda()
    x, y = torch.randint(0, 256, (2, 8, 256), device="cuda")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    return model, loss, (x, y)


def conv_net() -> tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]]:
    model = ResNet(ResNetConfig(widths=(32, 64), blocks_per_stage=2)).cuda()
    x, y = torch.randn(64, 1, 32, 32, device="cuda"), torch.randint(0, 10, (64,), device="cuda")
    return model, lambda x, y: F.cross_entropy(model(x), y), (x, y)


EVERY_NETWORK = pytest.mark.parametrize("network", [gpt, conv_net])


def peaks(step: Callable[[], object], *there: Any) -> tuple[int, int, int]:
    """Bytes requested and bytes allocated at the peak of a step, without those of others; blocks at the peak."""
    release()
    before, own = torch.cuda.memory_stats(), resident(*there)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    requested = after["requested_bytes.all.peak"] - before["requested_bytes.all.current"] + own
    allocated = after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"] + own
    return requested, allocated, after["active.all.peak"]


def backward(model: nn.Module, loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    loss(*inputs).backward()


@EVERY_NETWORK
def test_the_plain_peak_is_predicted(network: Callable[[], Any]) -> None:
    model, loss, inputs = network()
    backward(model, loss, inputs)  # workspaces, lazily loaded kernels
    model.zero_grad()
    plan = autoremat.plan(loss, *inputs, budget=1.0, timing="measure")
    requested, _, _ = peaks(lambda: backward(model, loss, inputs), model, *inputs)
    assert 0.98 * plan.plain_peak_bytes <= requested <= plan.plain_peak_bytes


@EVERY_NETWORK
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_the_measured_peak_is_not_above_the_plans(network: Callable[[], Any], share: float) -> None:
    """``share``: of the way from the floor to the plain peak."""
    model, loss, inputs = network()
    backward(model, loss, inputs)
    model.zero_grad()
    whole = autoremat.plan(loss, *inputs, budget=1.0, timing="measure")
    budget = whole.floor_bytes + int(share * (whole.plain_peak_bytes - whole.floor_bytes))
    call = autoremat.checkpoint(loss, budget=budget)
    for _ in range(2):
        backward(model, call, inputs)
        model.zero_grad()
    requested, allocated, blocks = peaks(lambda: backward(model, call, inputs), model, *inputs)
    stats = autoremat.stats(call)
    assert stats.plan is not None
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.reruns > 0
    assert requested <= stats.plan.peak_bytes <= budget
    assert allocated <= stats.plan.peak_bytes + blocks * (ROUNDING + LARGE_ROUNDING)


@pytest.mark.parametrize("kind", ["SGD", "Adam, one by one", "Adam, for each", "Adam, fused"])
def test_the_optimizers_step_is_in_the_account(kind: str) -> None:
    model, loss, inputs = gpt()
    how = {"one by one": {"foreach": False}, "for each": {"foreach": True}, "fused": {"fused": True}}
    name, _, which = kind.partition(", ")
    optimizer = getattr(torch.optim, name)(model.parameters(), 1e-3, **how.get(which, {"momentum": 0.9}))
    call = autoremat.checkpoint(loss, budget=0.8, optimizer=optimizer)

    def step() -> None:
        call(*inputs).backward()
        optimizer.step()

    for _ in range(3):
        step()
        optimizer.zero_grad()
    requested, _, _ = peaks(step, model, optimizer, *inputs)
    plan = autoremat.stats(call).plan
    assert plan is not None
    assert requested <= plan.peak_bytes


def test_the_peak_that_autoremat_measures_itself() -> None:
    model, loss, inputs = gpt()
    backward(model, loss, inputs)
    model.zero_grad()
    call = autoremat.checkpoint(loss, budget=0.6, measure=True)
    for _ in range(4):
        backward(model, call, inputs)
        model.zero_grad()
    stats = autoremat.stats(call)
    assert stats.plan is not None
    assert stats.measured_peak_bytes is not None
    assert 0.9 * stats.plan.peak_bytes <= stats.measured_peak_bytes <= 1.1 * stats.plan.peak_bytes


def test_what_the_device_has_is_a_budget() -> None:
    model, loss, inputs = gpt()
    call = autoremat.checkpoint(loss, budget="auto")
    backward(model, call, inputs)
    plan = autoremat.stats(call).plan
    assert plan is not None
    assert plan.peak_bytes == plan.plain_peak_bytes
    assert plan.budget_bytes <= torch.cuda.get_device_properties(0).total_memory


def test_a_forward_that_runs_out_is_tried_again_under_a_tighter_plan() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(24) for m in (nn.Linear(1024, 1024), nn.GELU())]
    model, x = nn.Sequential(*layers).cuda(), torch.randn(8192, 1024, device="cuda")  # 32 MiB per activation
    model(x).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    autoremat.checkpoint(model, budget=0.95)
    model(x).square().mean().backward()
    model.zero_grad()
    plan = autoremat.stats(model).plan
    assert plan is not None
    release()
    others = torch.cuda.memory_reserved() - resident(model, x)
    limit = others + int(0.75 * plan.peak_bytes)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    model(x).square().mean().backward()
    stats = autoremat.stats(model)
    assert stats.retries > 0
    assert stats.plan is not None
    assert stats.plan.peak_bytes < plan.peak_bytes
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.equal(g, h) for g, h in zip(grads, plain, strict=True))


def test_where_nothing_fits_the_error_tells() -> None:
    model, x = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).cuda(), torch.randn(8192, 1024, device="cuda")
    autoremat.checkpoint(model, budget=0.9)
    model(x).square().mean().backward()
    model.zero_grad()
    release()
    here = torch.cuda.memory_reserved() + (8 << 20)
    torch.cuda.set_per_process_memory_fraction(here / torch.cuda.get_device_properties(0).total_memory)
    with pytest.raises(torch.OutOfMemoryError, match="autoremat plan whose peak"):
        model(x)
    torch.cuda.set_per_process_memory_fraction(1.0)
    model(x).square().mean().backward()  # nothing is left behind that would hinder the next step


def test_an_input_of_the_host_is_refused() -> None:
    model = nn.Linear(32, 32).cuda()
    call = autoremat.checkpoint(lambda x: model(x.to("cuda", non_blocking=True)).square().mean(), budget=0.9)
    with pytest.raises(ValueError, match="several devices"):
        call(torch.randn(64, 32).pin_memory())
