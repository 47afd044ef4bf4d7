"""Steps that are not the recorded one: always exact, within the budget, and planned when they come back."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.engines.torch.eager.kinds import MAX_DEVIATIONS
from autoremat.engines.torch.eager.session import MAX_PLANS
from autoremat.engines.torch.eager.stats import Stats
from tests.engines.torch.eager.paths import WIDTH, blocks, both, gradients

pytestmark = pytest.mark.filterwarnings("ignore:autoremat")


class Branches(nn.Module):
    """Every block goes one of two ways, which the data decide."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks(8)

    def forward(self, x: Tensor, threshold: float) -> Tensor:
        for block in self.blocks:
            h = block(x)
            x = x + (h.sigmoid() * h if h.mean().item() > threshold else (h + 1).mul_(0.5).exp() * h)
        return x.square().mean()


@pytest.mark.slow
def test_branches_on_data_stay_within_the_budget() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, WIDTH)
    model = Branches()
    plain = autoremat.plan(model, x, 1.0, budget=1.0, timing="measure").plain_peak_bytes
    batches = [(x, 9.0)] + [(x, t) for t in (0.0, -9.0, 0.01, -0.01, 9.0, -9.0, 0.0, -9.0)]
    budget = int(0.6 * plain)
    peaks = both(model, budget, [(b, torch.tensor(t)) for b, t in batches], lambda m, b: m(b[0], b[1].item()))
    stats = both.stats  # type: ignore[attr-defined]
    assert stats.deviations > MAX_DEVIATIONS
    assert stats.reruns > 0
    assert max(peaks) <= budget


class LooksAtItsTensors(nn.Module):
    """Leaves out a mask that masks nothing, but not on fake tensors: as the masks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = blocks(8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        skip = not isinstance(mask, FakeTensor) and bool(mask.all())
        for block in self.blocks:
            h = block(x).sin()
            x = x + (h if skip else h * mask[:, None])
        return x.square().mean()


@pytest.mark.slow
@pytest.mark.guard
def test_the_path_of_the_real_step_is_planned_not_that_on_fake_tensors() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, WIDTH)
    model = LooksAtItsTensors()
    mask = torch.ones(512, dtype=torch.bool)
    budget = int(0.6 * autoremat.plan(model, x, mask, budget=1.0, timing="measure").plain_peak_bytes)
    peaks = both(model, budget, [(x, mask)] * 4, lambda m, b: m(*b))
    stats = both.stats  # type: ignore[attr-defined]
    assert (stats.planned, stats.deviations) == (1, 0)
    assert len(stats.plan.program.ops) < len(autoremat.plan(model, x, ~mask, budget=1.0).program.ops)
    assert max(peaks) <= budget


@pytest.mark.parametrize("looks", [False, True])
def test_a_recording_on_real_tensors_changes_nothing_in_a_closure(looks: bool) -> None:
    calls = torch.zeros(1)
    model = nn.Sequential(*blocks(2))

    def step(x: Tensor) -> Tensor:
        calls.add_(1)
        if looks:
            x = x * float(x.sum() > 0)
        return model(x).square().mean()

    call = autoremat.checkpoint(step, budget=1.0)
    call(torch.randn(8, WIDTH)).backward()
    assert calls.item() == 1


class Experts(nn.Module):
    """Every row goes to the expert that scores it highest: uneven, and different at each step."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, n) for _ in range(3))
        self.experts = nn.ModuleList(blocks(n) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for gate, experts in zip(self.gates, self.experts, strict=True):
            scores = gate(x).softmax(-1)
            chosen = scores.argmax(-1)
            y = torch.zeros_like(x)
            for k, expert in enumerate(experts):  # type: ignore[arg-type]
                rows = (chosen == k).nonzero().squeeze(-1)
                y = y.index_add(0, rows, expert(x[rows]) * scores[rows, k, None])
            x = x + y
        return x.square().mean()


@pytest.mark.slow
def test_mixture_of_experts_with_uneven_routing() -> None:
    torch.manual_seed(0)
    model = Experts()
    batches = [torch.randn(512, WIDTH) + 2 * torch.randn(WIDTH) * (k > 0) for k in range(10)]
    budget = int(0.75 * autoremat.plan(model, batches[0], budget=1.0, timing="measure").plain_peak_bytes)
    peaks = both(model, budget, batches, lambda m, b: m(b))
    assert both.stats.reruns > 0  # type: ignore[attr-defined]
    assert max(peaks) <= budget


class EarlyExit(nn.Module):
    """Leaves after as many blocks as the data ask for; drops blocks by torch's random numbers when it is told to."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.blocks, self.drop = blocks(8), drop

    def forward(self, x: Tensor, depth: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            if k >= depth.item():
                break
            if self.drop and torch.rand(()).item() < self.drop:
                continue
            x = x + F.dropout(block(x), 0.1, self.training)
        return x.square().mean()


@pytest.mark.slow
def test_early_exit() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(512, WIDTH), EarlyExit()
    budget = int(0.6 * autoremat.plan(model, x, torch.tensor(8), budget=1.0, timing="measure").plain_peak_bytes)
    batches = [(x, torch.tensor(d)) for d in (8, 3, 8, 5, 8, 2, 1, 7, 8, 8)]
    peaks = both(model, budget, batches, lambda m, b: m(*b))
    assert both.stats.deviations > 0  # type: ignore[attr-defined]
    assert max(peaks) <= budget


@pytest.mark.slow
def test_stochastic_depth() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(512, WIDTH), EarlyExit(drop=0.3)
    budget = int(0.7 * autoremat.plan(EarlyExit(), x, torch.tensor(8), budget=1.0, timing="measure").plain_peak_bytes)
    peaks = both(model, budget, [(x, torch.tensor(8))] * 12, lambda m, b: m(*b))
    assert both.stats.deviations > 0  # type: ignore[attr-defined]
    assert max(peaks) <= budget


def lengths(n_steps: int, n_lengths: int, model: GPT, budget: int) -> Stats:
    dice = torch.Generator().manual_seed(1)
    rows = [24 + 2 * int(torch.randint(n_lengths, (), generator=dice)) for _ in range(n_steps)]
    text = torch.randint(0, 256, (4, 24 + 2 * n_lengths + 1), generator=dice)
    batches = [(text[:, :n].contiguous(), text[:, 1 : n + 1].contiguous()) for n in rows]
    peaks = both(model, budget, batches, lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()))
    assert max(peaks) <= budget
    stats: Stats = both.stats  # type: ignore[attr-defined]
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.reruns > 0
    assert stats.plans <= MAX_PLANS
    return stats


def longest_plain_peak(model: GPT, n_lengths: int) -> int:
    x = torch.zeros(4, 24 + 2 * n_lengths, dtype=torch.int64)
    return autoremat.plan(lambda: F.cross_entropy(model(x).flatten(0, 1), x.flatten()), budget=1.0).plain_peak_bytes


@pytest.mark.slow
def test_variable_lengths() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(blocks=2, width=64, context=128))
    stats = lengths(8, 3, model, int(0.7 * longest_plain_peak(model, 3)))
    assert stats.planned <= 4  # of two recordings at most, what they foresee, and a better one


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_variable_lengths_for_200_steps() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(blocks=3, width=64, context=128))
    stats = lengths(200, 40, model, int(0.6 * longest_plain_peak(model, 40)))
    assert stats.plans <= 8


@pytest.mark.slow
def test_the_cache_of_plans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoremat.engines.torch.eager.session.MAX_PLANS", 2)
    model = nn.Sequential(*blocks(2))
    step = autoremat.checkpoint(lambda x: model(x).square().mean(), budget=0.9, time_limit_seconds=1.0)
    for n in (256, 320, 384, 448):
        step(torch.randn(n, WIDTH)).backward()
        assert autoremat.stats(step).plans <= 2


def test_switches_between_training_and_evaluation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*blocks(4), nn.Dropout(0.2), nn.BatchNorm1d(WIDTH))
    plain = copy.deepcopy(model)
    autoremat.checkpoint(model, budget=0.8, time_limit_seconds=1.0)
    for k in range(8):
        x = torch.randn(256, WIDTH)
        results = []
        for m in (plain, model):
            m.train(k % 3 != 1)
            m.zero_grad()
            torch.manual_seed(k)
            out = m(x)
            out.square().mean().backward()
            results.append((out.detach(), gradients(m), [b.clone() for b in m.buffers()]))
        (a, b, c), (d, e, f) = results
        assert torch.equal(a, d)
        assert all(map(torch.equal, b + c, e + f))
    assert autoremat.stats(model).deviations == 0


class Graph:
    """Tensors in an object of the user's: their sizes are not part of the kind of input."""

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, WIDTH)


@pytest.mark.slow
def test_larger_tensors_in_an_object_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*blocks(6))
    sizes = (256, 200, 300, 256, 400, 410, 380)

    def loss_of(model: nn.Module, graph: Graph) -> Tensor:
        return model(graph.x).sin().square().mean()

    budget = int(0.6 * autoremat.plan(lambda: loss_of(model, Graph(410)), budget=1.0).plain_peak_bytes)
    peaks = both(model, budget, [Graph(n) for n in sizes], loss_of)
    stats = both.stats  # type: ignore[attr-defined]
    assert stats.deviations > 0
    assert max(peaks) <= budget


@dataclass(slots=True)
class Cache:
    """A table that the first call makes."""

    table: Tensor | None = None


@pytest.mark.slow
@pytest.mark.guard
def test_what_the_first_step_caches_makes_no_deviation_of_the_second() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*blocks(6))
    cache = {nn.Module: Cache()}

    def loss_of(model: nn.Module, x: Tensor) -> Tensor:
        if type(model) not in cache:
            cache[type(model)] = Cache()
        held = cache[type(model)]
        if held.table is None:
            held.table = torch.arange(WIDTH, dtype=torch.float32).cos().exp()
        return model(x * held.table).sin().square().mean()

    x = torch.randn(512, WIDTH)
    budget = int(0.6 * autoremat.plan(lambda: loss_of(model, x), budget=1.0).plain_peak_bytes)
    cache.clear()
    peaks = both(model, budget, [x] * 4, loss_of)
    stats = both.stats  # type: ignore[attr-defined]
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.reruns > 0
    assert max(peaks) <= budget


class Seldom(nn.Module):
    """Revives, now and then, what is dead: a branch that steps take one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks(6))

    def forward(self, x: Tensor, is_dead: Tensor) -> Tensor:
        y = self.blocks(x)
        if is_dead:
            y = y.tanh() * 0.5
        return y.sin().square().mean()


@pytest.mark.slow
@pytest.mark.guard
def test_a_branch_taken_now_and_then_costs_no_recording() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(512, WIDTH), Seldom()
    budget = int(0.6 * autoremat.plan(model, x, torch.tensor(False), budget=1.0).plain_peak_bytes)
    batches = [(x, torch.tensor(k % 3 == 2)) for k in range(8)]
    peaks = both(model, budget, batches, lambda m, b: m(*b))
    stats = both.stats  # type: ignore[attr-defined]
    assert (stats.planned, stats.deviations) == (1, 2)
    assert max(peaks) <= budget


def test_a_branch_that_stays_is_recorded() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(512, WIDTH), Seldom()
    budget = int(0.6 * autoremat.plan(model, x, torch.tensor(False), budget=1.0).plain_peak_bytes)
    batches = [(x, torch.tensor(k > 1)) for k in range(8)]
    peaks = both(model, budget, batches, lambda m, b: m(*b))
    stats = both.stats  # type: ignore[attr-defined]
    assert stats.planned >= 2  # a quick plan may have been bettered
    assert stats.deviations == 2
    assert max(peaks) <= budget
