"""Gradients that stay: one recording, at most two plans; exact, and to the byte what was planned beforehand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager import steps
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.world.gradients import gradients_found, gradients_left, with_gradients
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.program import Program, simulate
from tests.zoo import CASES, Case

Step = Callable[..., Tensor]
EVERYDAY = "pre-activation ResNet"
WIDTH, ROWS = 24, 64


def by_case(*everyday: str, guards: Collection[str] = ()) -> pytest.MarkDecorator:
    def marks(name: str) -> list[pytest.MarkDecorator]:
        return ([] if name in everyday else [pytest.mark.slow]) + [pytest.mark.guard] * (name in guards)

    return pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=marks(str(c))) for c in CASES])


def measured(step: Step, model: nn.Module, *inputs: Tensor) -> int:
    """The peak of one micro-step, by the allocator's account."""
    return account(lambda: step(*inputs).backward(), resident(model, *inputs)).peak_bytes


def both(
    mine: nn.Module, step: Step, plain: nn.Module, plain_step: Step, *inputs: Any, seed: int = 0
) -> int:  # fmt: skip
    """One micro-step each; the peak of the first one. Loss and gradients are the same."""
    results = list[Tensor]()

    def go(call: Step) -> None:
        loss = call(*inputs)
        loss.backward()
        results.append(loss.detach())

    torch.manual_seed(seed)
    go(plain_step)
    torch.manual_seed(seed)
    tensors = (x for x in inputs if isinstance(x, Tensor))
    peak = account(lambda: go(step), resident(mine, *tensors)).peak_bytes
    assert torch.equal(*results)
    for p, q in zip(mine.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    return peak


class Counted:
    """How many steps have been recorded since."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        recorded = steps.FirstStep

        def first(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            return recorded(*args, **kwargs)

        monkeypatch.setattr(steps, "FirstStep", first)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


# ---- to the byte -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
@by_case(EVERYDAY)
def test_plain_steps_that_find_gradients_take_what_was_said(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.model(), case.inputs()
    step = case.loss(model)
    first = autoremat.plan(step, *inputs, budget=1.0, timing="measure").plain_peak_bytes
    later = autoremat.plan(step, *inputs, budget=1.0, timing="measure", accumulate=True).plain_peak_bytes
    step(*inputs).backward()
    model.zero_grad()
    assert [measured(step, model, *inputs) for _ in range(3)] == [first, later, later]


@by_case(guards=[str(c) for c in CASES if str(c) != "unrolled LSTM"])  # which takes three minutes
def test_the_floor_of_accumulation_is_a_budget_for_all_of_it(case: Case, records: Counted) -> None:
    torch.manual_seed(0)
    plain, inputs = case.model(), case.inputs()
    mine = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (plain, mine)]
    floor = autoremat.plan(case.loss(mine), *inputs, budget=1.0, timing="measure", accumulate=True).floor_bytes
    step, plain_step = autoremat.checkpoint(case.loss(mine), budget=floor), case.loss(plain)
    for micro_step in range(6):
        peak = both(mine, step, plain, plain_step, *inputs, seed=micro_step)
        plan = autoremat.stats(step).plan
        if micro_step:  # the first has no plan in its forward
            assert peak == plan.peak_bytes <= floor
        assert autoremat.verify(plan.program, plan) == ()
        assert bool(gradients_found(plan.program)) == bool(micro_step % 3)
        if micro_step == 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    stats = autoremat.stats(step)
    assert (records.n, stats.planned, stats.deviations, stats.unplanned) == (1, 2, 0, 0)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), mine.parameters(), strict=True))


class Odd(nn.Module):
    """Gradients that leaves do not just take: copied, shared, summed, none at all, of a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.above, self.below = (
            nn.Parameter(torch.randn(WIDTH // 2, WIDTH)),
            nn.Parameter(torch.ones(WIDTH // 2, WIDTH)),
        )
        self.plus, self.minus = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.expanded, self.turned = nn.Parameter(torch.zeros(ROWS, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.unused = nn.Parameter(torch.zeros(100))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(x)).tanh()).tanh()
        x = x @ torch.cat([self.above, self.below]) + (self.plus + self.minus)
        x = self.frozen(x @ self.turned).tanh()
        return x.square().mean() + self.expanded.sum()


def odd_loss(model: nn.Module) -> Step:
    return lambda x: model(x)


@pytest.mark.slow
@pytest.mark.guard
def test_gradients_that_are_copied_shared_or_summed() -> None:
    torch.manual_seed(0)
    plain, x = Odd(), torch.randn(ROWS, WIDTH)
    mine = copy.deepcopy(plain)
    later = autoremat.plan(mine, x, budget=1.0, timing="measure", accumulate=True)
    assert {"unused", "frozen.weight"}.isdisjoint(gradients_found(later.program))
    plain(x).backward()
    plain.zero_grad()
    first = measured(plain, plain, x)
    assert measured(plain, plain, x) == later.plain_peak_bytes > first
    plain.zero_grad()
    step = autoremat.checkpoint(odd_loss(mine), budget=later.floor_bytes)
    for k in range(4):
        peak = both(mine, step, plain, plain, x, seed=k)
        assert peak <= later.floor_bytes
        assert k == 0 or peak == autoremat.stats(step).plan.peak_bytes
    assert autoremat.stats(step).planned == 2


def test_no_moment_has_less_when_more_gradients_are_there() -> None:
    """Which is why a plan serves steps that find fewer of them."""
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(ROWS, WIDTH)
    program = record(model, (x,), timing="estimate")
    left = gradients_left(program)
    before = simulate(program)
    for n in range(1, len(left) + 1):
        found = with_gradients(program, dict(list(left.items())[:n]))
        now = simulate(found)
        assert all(a <= b for a, b in zip(before.resident_bytes, now.resident_bytes, strict=True))
        assert gradients_found(found).keys() == set(list(left)[:n])
        assert with_gradients(found, left).fixed_bytes == program.fixed_bytes + sum(left.values())
        before = now


# ---- kinds of one training -------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(3)]
    return nn.Sequential(*layers)


def clip(model: nn.Module, step: int) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def unscale(model: nn.Module, step: int) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(1 / 8)


def lose_one(model: nn.Module, step: int) -> None:
    list(model.parameters())[step % 5].grad = None


def nothing(model: nn.Module, step: int) -> None:
    pass


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("between", "to_none"),
    [
        pytest.param(between, to_none, marks=() if (between is lose_one) is to_none else pytest.mark.slow)
        for between in (nothing, clip, unscale, lose_one)
        for to_none in (True, False)
    ],
)
def test_accumulation_is_recorded_once_and_planned_twice(
    between: Callable[[nn.Module, int], None], to_none: bool, records: Counted
) -> None:
    plain = network()
    plain[1][0].requires_grad_(False)
    mine = copy.deepcopy(plain)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad]) for m in (plain, mine)]
    x = torch.randn(ROWS, WIDTH)
    state_bytes = optimizer_bytes(optimizers[1]).state
    budget = autoremat.plan(
        lambda x: mine(x).square().mean(), x, budget=1.0, timing="measure", accumulate=True, optimizer=state_bytes
    ).floor_bytes
    step = autoremat.checkpoint(lambda x: mine(x).square().mean(), budget=budget, optimizer=state_bytes)
    for micro_step in range(9):
        peak = both(mine, step, plain, lambda x: plain(x).square().mean(), torch.randn(ROWS, WIDTH), seed=micro_step)
        assert peak + state_bytes <= budget
        for model, optimizer in zip((plain, mine), optimizers, strict=True):
            between(model, micro_step)
            if micro_step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
    stats = autoremat.stats(step)
    assert (records.n, stats.planned, stats.plans, stats.deviations, stats.unplanned) == (1, 2, 2, 0, 0)


class Experts(nn.Module):
    """Every row goes to all experts with a weight; only some of them have trained before."""

    def __init__(self, n: int = 6) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        return sum((e(x).tanh() for e in self.experts), x).square().mean()


@pytest.mark.slow
def test_gradients_of_any_of_the_experts_make_no_new_kinds(records: Counted) -> None:
    torch.manual_seed(0)
    plain = Experts()
    mine = copy.deepcopy(plain)
    step = autoremat.checkpoint(lambda x: mine(x), budget="80%")
    for k in (0, 5, 12, 33, 63, 18, 41, 7, 0, 20):
        for model in (plain, mine):
            for i, expert in enumerate(model.experts):
                if not k >> i & 1:
                    expert.zero_grad()
        both(mine, step, plain, plain, torch.randn(ROWS, WIDTH), seed=k)
    stats = autoremat.stats(step)
    assert (records.n, stats.planned, stats.deviations, stats.unplanned) == (1, 2, 0, 0)


@pytest.mark.slow
@pytest.mark.guard
def test_batches_of_many_lengths_are_accumulated(records: Counted) -> None:
    """What is known of sizes without gradients is known of sizes with them."""
    plain = network()
    mine = copy.deepcopy(plain)
    step = autoremat.checkpoint(lambda x: mine(x).square().mean(), budget=400_000)
    for k, rows in enumerate((40, 50, 40, 55, 70, 40, 66, 20, 90, 80)):
        both(mine, step, plain, lambda x: plain(x).square().mean(), torch.randn(rows, WIDTH), seed=k)
    stats = autoremat.stats(step)
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert records.n <= 3


def test_a_training_that_begins_with_gradients(records: Counted) -> None:
    plain = network()
    mine = copy.deepcopy(plain)
    for model in (plain, mine):
        model[0](torch.ones(4, WIDTH)).sum().backward()
    step = autoremat.checkpoint(lambda x: mine(x).square().mean(), budget="70%")
    for k in range(3):
        peak = both(mine, step, plain, lambda x: plain(x).square().mean(), torch.randn(ROWS, WIDTH), seed=k)
        assert peak <= autoremat.stats(step).plan.budget_bytes
    assert (records.n, autoremat.stats(step).planned) == (1, 1)


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_plan_that_is_given_serves_accumulation(accumulate: bool, records: Counted) -> None:
    plain = network()
    mine = copy.deepcopy(plain)
    x = torch.randn(ROWS, WIDTH)
    most = autoremat.plan(lambda x: mine(x).square().mean(), x, budget=1.0, timing="measure", accumulate=True)
    plan = autoremat.plan(
        lambda x: mine(x).square().mean(), x, budget=most.floor_bytes, timing="measure", accumulate=accumulate
    )
    step = autoremat.checkpoint(lambda x: mine(x).square().mean(), plan=plan)
    for k, rows in enumerate((ROWS, ROWS // 2, ROWS, ROWS - 1)):
        peak = both(mine, step, plain, lambda x: plain(x).square().mean(), torch.randn(rows, WIDTH), seed=k)
        assert peak <= plan.budget_bytes
    stats = autoremat.stats(step)
    assert (records.n, stats.planned, stats.deviations) == (1, 0 if accumulate else 1, 0)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_step_that_does_not_fit_any_more_names_what_has_come() -> None:
    model, x = network(), torch.randn(ROWS, WIDTH)
    plan = autoremat.plan(lambda x: model(x).square().mean(), x, budget=1.0, timing="measure")
    step = autoremat.checkpoint(lambda x: model(x).square().mean(), budget=plan.floor_bytes)
    step(x).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters())
    with pytest.raises(autoremat.InfeasibleBudget) as caught:
        step(x)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.arrived == (("gradients", gradients),)
    assert f"finds {gradients:,} bytes of gradients (12 parameters) that the first step has not found" in str(error)
    assert f"the floor is {error.floor_bytes:,} bytes" in str(error)
    later = autoremat.plan(lambda x: model(x).square().mean(), x, budget=1.0, timing="measure", accumulate=True)
    assert error.floor_bytes == later.floor_bytes
    model.zero_grad()
    step(x).backward()  # as before


def test_a_larger_input_that_does_not_fit_is_named() -> None:
    model, x = network(), torch.randn(ROWS, WIDTH)
    plan = autoremat.plan(lambda x: model(x).square().mean(), x, budget=1.0, timing="measure")
    step = autoremat.checkpoint(lambda x: model(x).square().mean(), budget=plan.floor_bytes)
    step(x).backward()
    with pytest.raises(autoremat.InfeasibleBudget, match=r"bytes of gradients .* and [\d,]+ bytes of inputs") as caught:
        step(torch.randn(2 * ROWS, WIDTH))
    assert dict(caught.value.arrived)["inputs"] == x.nbytes


def test_gradients_without_which_it_fits_are_planned_exactly() -> None:
    """All that the backward makes would be too much, what is there is not."""
    torch.manual_seed(0)
    model, x = Experts(2), torch.randn(ROWS, WIDTH)
    program = record(model, (x,), timing="measure")
    left = gradients_left(program)
    some = {n: b for n, b in left.items() if n.startswith("experts.1")}
    floor = autoremat.plan(model, x, budget=1.0, timing="measure").floor_bytes
    assert solve_floor(with_gradients(program, some)) < solve_floor(with_gradients(program, left))
    step = autoremat.checkpoint(lambda x: model(x), budget=solve_floor(with_gradients(program, some)))
    step(x).backward()
    model.experts[0].zero_grad()
    step(x).backward()
    assert gradients_found(autoremat.stats(step).plan.program) == some
    assert autoremat.stats(step).plan.peak_bytes >= floor


def solve_floor(program: Program) -> int:
    return autoremat.frontier(program, points=2).points[0].peak_bytes


# ---- asking beforehand -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
def test_everything_that_plans_takes_it() -> None:
    model, x = network(), torch.randn(ROWS, WIDTH)
    gradients = sum(p.nbytes for p in model.parameters())
    plan = autoremat.plan(model, x, budget=1.0, accumulate=True)
    assert autoremat.explain(model, x, accumulate=True).categories["gradients"] >= gradients
    assert autoremat.frontier(model, x, points=2, accumulate=True).points[-1].peak_bytes == plan.plain_peak_bytes
    alone, beside = (
        autoremat.max_batch(
            model, lambda n: torch.randn(n, WIDTH), budget=plan.plain_peak_bytes, overhead=0.0, start=ROWS,
            most=2 * ROWS, time_limit_seconds=0.1, accumulate=a,
        ).batch
        for a in (False, True)
    )  # fmt: skip
    assert beside < alone
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TypeError, match="accumulate"):
        autoremat.frontier(plan.program, accumulate=True)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model, x = nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)
    plan = autoremat.plan(lambda x: F.gelu(model(x)).sum(), x, budget=1.0, accumulate=True)
    assert sum(gradients_found(plan.program).values()) == sum(p.nbytes for p in model.parameters())
