"""Steps that leave their path, again and again or half-way: exact, and within the budget."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.kinds import MAX_DEVIATIONS, Kind
from autoremat.engines.torch.eager.room import OfScript
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.tape import Tape
from autoremat.engines.torch.world.memory_account import account, resident
from tests.engines.torch.eager.paths import WIDTH, Rounds, both, budget_of, gradients

pytestmark = pytest.mark.filterwarnings("ignore:autoremat")


@pytest.mark.slow
@pytest.mark.parametrize("first", [4, 5, 6])
def test_what_a_short_plan_keeps_can_go_when_the_path_is_longer(first: int) -> None:
    """The plan for so few layers keeps nearly everything; the steps after it have more of them."""
    torch.manual_seed(0)
    x, model = torch.randn(256, WIDTH), Rounds()
    budget = budget_of(model, 0.65, x, torch.tensor(10))
    batches = [(x, torch.tensor(n)) for n in (first, 10, first, first, 9, 10, 7)]
    peaks = both(model, budget, batches, lambda m, b: m(*b))
    stats = both.stats  # type: ignore[attr-defined]
    assert stats.deviations >= 2
    assert max(peaks) <= budget


@pytest.mark.slow
def test_being_wary_costs_no_byte_on_the_path() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(256, WIDTH), Rounds()
    budget = budget_of(model, 0.7, x, torch.tensor(10))
    peaks = {}
    for is_wary in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kind, "is_wary", property(lambda kind, is_wary=is_wary: is_wary))
            peaks[is_wary] = both(copy.deepcopy(model), budget, [(x, torch.tensor(10))] * 4, lambda m, b: m(*b))
    assert set(peaks[True]) == set(peaks[False])
    assert max(peaks[True]) <= both.stats.plan.peak_bytes + 64  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.guard
def test_a_graph_off_its_path_is_gone_through_twice() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(64, WIDTH), Rounds()
    plain = copy.deepcopy(model)
    step = autoremat.checkpoint(lambda n: model(x, n), budget=budget_of(model, 0.7, x, torch.tensor(10)))
    for n in (5, 10, 8):
        expected, got = [], []
        for m, call, found in ((plain, lambda n: plain(x, n), expected), (model, step, got)):
            m.zero_grad()
            torch.manual_seed(n)
            loss = call(torch.tensor(n))
            loss.backward(retain_graph=True)
            loss.backward()
            found += [loss.detach(), *gradients(m), *m.buffers()]
        assert all(map(torch.equal, got, expected))
    assert autoremat.stats(step).deviations == 2


class Overwrites(nn.Module):
    """What the plan keeps is overwritten off the path: an error, as in plain training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, is_bad: Tensor) -> Tensor:
        y = self.layer(x).sigmoid()
        z = y.sin()
        if is_bad:
            z = z.cos()
            y.mul_(2.0)
        return (z * z).sum()


def test_what_is_overwritten_off_the_path_is_an_error_as_in_plain_training() -> None:
    x, model = torch.randn(64, WIDTH), Overwrites()
    step = autoremat.checkpoint(lambda n: model(x, n), budget=1.0)
    for is_bad in (False, False, True, False):
        loss = step(torch.tensor(is_bad))
        if is_bad:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_gradients_do_not_grow_with_the_input() -> None:
    """Of 700 bytes that are taken beside what the tape holds 400 are gradients, and 100 always there."""
    script = Script(
        funcs=(), works=(), packs=(), asked=frozenset(), acts=(), hold=frozenset(), budget_bytes=1000,
        beside_bytes=(300, 700), gradient_bytes=(0, 400), fixed_bytes=100,
    )  # fmt: skip
    assert OfScript(script, growth=1.0).allowed_bytes(0, 1.0) == 1000 - 700
    assert OfScript(script, growth=1.5).allowed_bytes(0, 1.0) == 1000 - 700 - 0.5 * 200
    assert OfScript(script, growth=1.5).allowed_bytes(0, None) == 1000 - 300 - 0.5 * 200


class Refined(nn.Module):
    """As many rounds as the data ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n)):
            x = torch.tanh(self.cell(x))
        return x.square().mean()


@pytest.mark.slow
@pytest.mark.guard
def test_steps_that_leave_at_the_same_call_but_go_on_differently_are_not_recorded() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(64, WIDTH), Refined()
    both(model, 1.0, [(x, torch.tensor(n)) for n in (4, 6, 7, 9, 5)], lambda m, b: m(*b))
    stats = both.stats  # type: ignore[attr-defined]
    assert (stats.planned, stats.deviations) == (1, 4)


def test_a_path_that_is_left_again_and_again_is_not_tried_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left, leave_path = [], Tape.leave_path

    def leave(tape: Tape, reason: str, growth: float = 1.0) -> None:
        left.append(reason)
        leave_path(tape, reason, growth)

    monkeypatch.setattr(Tape, "leave_path", leave)
    x, model = torch.randn(64, WIDTH), Refined()
    step = autoremat.checkpoint(lambda x, n: model(x, n), budget=1.0, time_limit_seconds=1.0)
    for k in range(30):
        step(x, torch.tensor(4 if k == 0 else 5 + k % 3)).backward()
    assert len(left) == MAX_DEVIATIONS + 1
    for _ in range(30):
        step(x, torch.tensor(4)).backward()  # the path again: in time it is followed
    deviations = autoremat.stats(step).deviations
    step(x, torch.tensor(4)).backward()
    assert autoremat.stats(step).deviations == deviations


def of_second_derivatives(model: nn.Module, x: Tensor) -> Tensor:
    """A loss as of physics-informed networks."""
    x = x.detach().requires_grad_()
    u = model(x)
    first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0][:, 0]
    return (first[:, 1] - 0.1 * second + u[:, 0] * first[:, 0]).square().mean()


def of_inner_steps(model: nn.Module, x: Tensor) -> Tensor:
    """A loss after two steps of training inside: the outer gradient goes through all of it."""
    weights = dict(model.named_parameters())
    for _ in range(2):
        loss = torch.func.functional_call(model, weights, (x,)).square().mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    return torch.func.functional_call(model, weights, (x,)).square().mean()


@pytest.mark.one_in(4, guard=True)
@pytest.mark.parametrize("loss_of", [of_second_derivatives, of_inner_steps])
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_passes_within_the_forward_are_in_the_plan(
    loss_of: Callable[[nn.Module, Tensor], Tensor], share: float
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())], nn.Linear(WIDTH, 1))
    x = torch.randn(512, WIDTH)
    plan = autoremat.plan(lambda: loss_of(model, x), budget=1.0)
    floor = plan.floor_bytes
    while True:
        try:
            budget = int(floor + share * (plan.plain_peak_bytes - floor))
            peaks = both(model, budget, [x] * 3, loss_of)
            break
        except autoremat.InfeasibleBudget as error:
            floor = error.floor_bytes
    stats = both.stats  # type: ignore[attr-defined]
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.reruns > 0
    assert max(peaks) <= budget


class Turning(nn.Module):
    """Layers whose second half has another activation in some steps."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layers, self.turns = nn.ModuleList(nn.Linear(32, 32) for _ in range(n)), False

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = torch.sigmoid(x) if self.turns and 2 * i >= len(self.layers) else torch.tanh(x)
        return x.square().mean()


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.filterwarnings("ignore:autoremat")
@pytest.mark.parametrize("above", [1.4, 1.8])
def test_a_step_that_leaves_its_path_half_way_is_within_a_budget_well_above_the_floor(above: float) -> None:
    torch.manual_seed(0)
    mine, x = Turning(16), torch.randn(512, 32)
    plain = copy.deepcopy(mine)
    floor = autoremat.plan(mine, x, budget=1.0, timing="measure").floor_bytes
    budget = int(above * floor)
    autoremat.checkpoint(mine, budget=budget)
    for turns in (False, True, False, True):
        mine.turns = plain.turns = turns
        mine.zero_grad()
        plain.zero_grad()
        peak = account(lambda: mine(x).backward(), resident(mine, x)).peak_bytes
        plain(x).backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(mine.parameters(), plain.parameters(), strict=True))
        assert peak <= budget
    assert autoremat.stats(mine).deviations == 2


class Renewed(nn.Module):
    """Between two chains, codes that no gradient reaches are renewed while some of them are unused."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            nn.Sequential(*(nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 32)) for _ in range(4)))
            for _ in range(2)
        )
        self.register_buffer("codes", torch.randn(64, 32))

    def forward(self, x: Tensor, is_unused: Tensor) -> Tensor:
        z = self.encoder(x)
        with torch.no_grad():
            nearest = torch.cdist(z, self.codes).argmin(1)
            if is_unused:
                self.codes[:4] = z[torch.randint(len(z), (4,))]
        coded = z + (self.codes[nearest] - z).detach()
        return (self.decoder(coded) - x).square().mean()


def test_a_step_off_the_path_stays_within_the_floor() -> None:
    """There the plan itself makes most calls several times, and a step off the path needs as much patience."""
    torch.manual_seed(0)
    x, model = torch.randn(512, 32), Renewed()
    flags = [torch.tensor(n < 4) for n in range(6)]
    model(x, flags[-1]).backward()  # gradients are there, as in every step but the first
    floor_bytes = autoremat.plan(copy.deepcopy(model), x, flags[0], budget=1.0).floor_bytes
    peaks = both(model, floor_bytes, [(x, flag) for flag in flags], lambda m, b: m(*b))
    assert both.stats.deviations == 2  # type: ignore[attr-defined]
    assert max(peaks) <= 1.005 * floor_bytes


class Recurrence(nn.Module):
    """A cell, one call of torch, that saves several tensors; applied as often as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(int(n)):
            h = self.cell(x, h)
        return h.square().mean()


def test_a_call_that_is_made_again_off_the_path_gives_all_that_is_still_wanted_of_it() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(64, WIDTH), Recurrence()
    budget, steps = budget_of(model, 0.5, x, torch.tensor(24)), (23, 24, 20, 24, 22)
    peaks = both(model, budget, [(x, torch.tensor(n)) for n in steps], lambda m, b: m(*b))
    stats = both.stats  # type: ignore[attr-defined]
    assert stats.deviations >= 3
    assert max(peaks) <= budget
    assert sum(steps) < stats.reruns <= 2 * sum(steps)  # one rerun for each tensor that is saved were 4 and more
