"""What a user can ask for during training: counts, seconds, and the measured peak beside the plan's."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import autoremat
from autoremat.engines.torch.eager import measure
from autoremat.engines.torch.eager.measure import CudaMeter, Measurement
from autoremat.engines.torch.eager.session import Session
from autoremat.engines.torch.eager.stats import Stats
from autoremat.engines.torch.world.memory_account import account, resident

HOOKS = _global_optimizer_post_hooks, _global_optimizer_pre_hooks


@pytest.fixture(autouse=True)
def _no_profiler_is_left_behind() -> Iterator[None]:
    before = [len(h) for h in HOOKS]
    yield
    assert not torch.autograd._profiler_enabled()
    assert [len(h) for h in HOOKS] == before


def network(n: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(n) for layer in (nn.Linear(32, 32), nn.GELU())])


class Training:
    """A model, a loss within a budget, and an optimizer."""

    def __init__(self, budget: float | str = 0.7, *, with_optimizer: bool = True, measured: bool = True) -> None:
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.x = torch.randn(512, 32)
        self.loss: Callable[[Tensor], Tensor] = autoremat.checkpoint(
            lambda x: self.model(x).square().mean(), budget=budget, time_limit_seconds=1, measure=measured,
            optimizer=self.optimizer if with_optimizer else None,
        )  # fmt: skip

    def step(self) -> None:
        self.loss(self.x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def stats(self) -> Stats:
        return autoremat.stats(self.loss)


def test_calls_that_found_their_plan_are_counted_and_seconds_grow() -> None:
    t = Training(measured=False)
    for _ in range(3):
        t.step()
    s = t.stats
    assert (s.calls, s.hits, s.planned, s.plans, s.fallbacks) == (3, 2, 1, 1, 0)
    assert s.measured_peak_bytes is None
    assert 0 < s.rerun_seconds < 60
    t.step()
    assert t.stats.rerun_seconds > s.rerun_seconds
    assert t.stats.reruns > s.reruns


def test_nothing_runs_again_in_no_time() -> None:
    t = Training("100%", measured=False)
    t.step()
    assert (t.stats.reruns, t.stats.rerun_seconds) == (0, 0.0)


def test_numbers_for_a_logger() -> None:
    t = Training(measured=False)
    assert autoremat.stats(t.loss).as_dict() == {
        "plans": 0, "calls": 0, "hits": 0, "planned": 0, "deviations": 0, "unplanned": 0, "reruns": 0,
        "rerun_seconds": 0.0, "retries": 0, "differing": 0, "fallbacks": 0,
    }  # fmt: skip
    t.step()
    numbers, plan = t.stats.as_dict(), t.stats.plan
    assert plan is not None
    assert all(type(n) in (int, float) for n in numbers.values())
    assert (numbers["peak_bytes"], numbers["budget_bytes"]) == (plan.peak_bytes, plan.budget_bytes)
    assert (numbers["overhead"], numbers["lower_bound"]) == (plan.overhead, plan.lower_bound)
    assert "measured_peak_bytes" not in numbers
    assert str(t.stats).splitlines()[1].split() == ["calls", "1"]


def test_calls_without_a_plan_of_theirs_are_fallbacks() -> None:
    t = Training(measured=False)
    t.step()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t), pytest.warns(RuntimeWarning, match="hook"):
        t.step()
    assert (t.stats.unplanned, t.stats.fallbacks) == (1, 1)


# --- The measured peak ------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("with_optimizer", [False, True])
@pytest.mark.parametrize("budget", [0.7, "100%"])
def test_the_measured_peak_is_the_plans_to_the_byte(budget: float | str, with_optimizer: bool) -> None:
    t = Training(budget, with_optimizer=with_optimizer)
    t.step()
    assert t.stats.measured_peak_bytes is None  # the first step compares what runs twice
    t.step()
    s = t.stats
    assert s.plan is not None
    if not with_optimizer:
        assert s.measured_peak_bytes == s.plan.peak_bytes
        return
    # The state counts in the plan from the first step on; what the step itself takes is in both accounts.
    assert s.measured_peak_bytes == account(t.step, resident(t.model, t.optimizer, t.x)).peak_bytes <= s.plan.peak_bytes


def test_a_measured_step_is_bit_identical() -> None:
    plain, mine = Training("100%", measured=False), Training()
    for _ in range(4):
        plain.step()
        mine.step()
    assert mine.stats.measured_peak_bytes is not None
    assert all(map(torch.equal, plain.model.parameters(), mine.model.parameters()))


def test_every_plan_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = measure.ProfilerMeter
    monkeypatch.setattr(measure, "ProfilerMeter", lambda: made.append(plain()) or made[-1])
    t = Training("100%")
    for rows in (256, 256, 256, 512, 512, 512, 512, 256):
        t.x = torch.randn(rows, 32)
        t.step()
    assert len(made) == 2


def test_without_an_optimizer_the_next_call_ends_the_account() -> None:
    t = Training()
    for _ in range(3):
        t.loss(t.x).backward()
        t.model.zero_grad()
    assert t.stats.measured_peak_bytes == t.stats.plan.peak_bytes


def test_the_step_of_another_optimizer_before_the_backward_does_not_end_it() -> None:
    t, w = Training(with_optimizer=False), nn.Parameter(torch.ones(3))
    other = torch.optim.SGD([w])
    for _ in range(2):
        loss = t.loss(t.x)
        w.grad = torch.ones(3)
        other.step()
        loss.backward()
        t.model.zero_grad()
    assert t.stats.measured_peak_bytes is not None
    assert t.stats.measured_peak_bytes >= t.stats.plan.peak_bytes


def test_an_optimizer_that_steps_within_the_backward_does_not_end_it() -> None:
    t = Training(with_optimizer=False)
    for p in t.model.parameters():
        own = torch.optim.SGD([p])
        p.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
    for _ in range(2):
        t.loss(t.x).backward()
        t.model.zero_grad()
    assert t.stats.measured_peak_bytes is not None
    assert not torch.autograd._profiler_enabled()


def test_an_abandoned_forward_measures_nothing_and_the_next_step_does() -> None:
    t = Training(with_optimizer=False)
    t.step()
    t.loss(t.x)
    assert t.stats.measured_peak_bytes is None
    t.step()
    assert t.stats.measured_peak_bytes == t.stats.plan.peak_bytes


def test_a_profiler_of_the_user_is_left_alone() -> None:
    t = Training(with_optimizer=False)
    t.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        t.step()
    assert any("addmm" in e.key for e in profiler.key_averages())
    assert t.stats.measured_peak_bytes is None
    t.step()
    assert t.stats.measured_peak_bytes == t.stats.plan.peak_bytes


def test_a_measured_peak_above_the_plans_is_said_once() -> None:
    model = autoremat.checkpoint(network(), budget="100%", measure=True, time_limit_seconds=1)
    x = torch.randn(512, 32)
    seen: list[str] = []
    for rows in (512, 512, 512, 256, 256, 256):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = model(x[:rows])
            torch.cat([y] * 20).sum().backward()  # outside, so not in the plan
            stats = autoremat.stats(model)
        seen += [str(w.message) for w in caught]
    assert stats.measured_peak_bytes > 1.01 * stats.plan.peak_bytes
    assert len(seen) == 1
    assert "the measured peak of a step is above the plan's" in seen[0]
    assert "wrap a function that returns the loss" in seen[0]


@pytest.mark.slow  # another process imports torch
def test_a_process_that_ends_in_the_middle_of_a_measured_step_ends_well() -> None:
    script = """
import torch, autoremat
model = autoremat.checkpoint(torch.nn.Linear(8, 8), budget="100%", measure=True)
for _ in range(2):
    model.zero_grad()
    model(torch.ones(4, 8)).sum().backward()
assert torch.autograd._profiler_enabled()
"""
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- CUDA, whose statistics are played by a list ----------------------------------------------------------------------


class Allocator:
    """Stands in for ``torch.cuda``: what is allocated, and the most that was."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "most", self.now))

    def reach(self, nbytes: int, then: int) -> None:
        self.most, self.now = max(self.most, nbytes), then


@pytest.mark.parametrize(("reset", "above"), [(False, None), (True, 60)])
def test_the_statistics_of_cuda_tell_only_what_rises_above_their_mark(
    monkeypatch: pytest.MonkeyPatch, reset: bool, above: int | None
) -> None:
    allocator = Allocator(monkeypatch)
    allocator.reach(500, then=100)
    meter = CudaMeter(torch.device("cuda"), reset=reset)
    allocator.reach(160, then=100)
    assert meter.stop() == above
    assert allocator.most == (160 if reset else 500)
    meter = CudaMeter(torch.device("cuda"), reset=False)
    allocator.reach(700, then=100)
    assert meter.stop() == 600


def test_on_cuda_the_statistics_are_reset_only_where_the_user_asks() -> None:
    tensors = [SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))]
    made: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "CudaMeter", lambda device, reset: made.append(reset))
        for asked in (True, False):
            measure.meter_for(tensors, asked=asked)
    assert made == [True, False]
    assert measure.meter_for(tensors[:1], asked=False) is None


def test_an_account_that_cannot_be_had_is_none() -> None:
    class Silent:
        def stop(self) -> None:
            return None

    heard: list[int] = []
    one = Measurement(Silent(), False, heard.append)
    x = torch.ones(2, requires_grad=True)
    one.watch({"loss": [loss := x.sum()]})
    loss.backward()
    assert one.close()
    assert heard == []


def test_a_session_measures_only_if_asked() -> None:
    assert Session(lambda x: x, planner=None).measure is False  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [(), ("0",)])
def test_the_floor_of_a_first_plan_is_a_budget_that_is_accepted_and_a_byte_less_is_not(keep: tuple[str, ...]) -> None:
    layers = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.Tanh())))
    x = torch.randn(256, 32)

    def trained(budget: int | float) -> int:
        step = autoremat.checkpoint(lambda x: layers(x).square().mean(), budget=budget, keep=keep)
        step(x)
        plan = autoremat.stats(step).plan
        assert plan is not None
        return plan.floor_bytes

    floor = trained(1.0)
    assert floor < plain_peak(layers, x)
    assert trained(floor) == floor
    with pytest.raises(autoremat.InfeasibleBudget) as error:
        trained(floor - 1)
    assert error.value.floor_bytes == floor


def plain_peak(layers: nn.Module, x: torch.Tensor) -> int:
    return autoremat.plan(lambda x: layers(x).square().mean(), x, budget=1.0).plain_peak_bytes
