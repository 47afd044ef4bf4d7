"""A plan made beforehand is that of the training: the same program, a floor that is accepted, a peak that is met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.problems import UnusableInput
from autoremat.program import Once, Program, Value, simulate
from tests.zoo import CASES, Case

SMALL = [c for c in CASES if c.name in ("pre-activation ResNet", "U-Net", "encoder-decoder", "XOR MLP")]


def trained(loss: Any, inputs: tuple[Tensor, ...]) -> Program:
    """The program that a training step records."""
    step = autoremat.checkpoint(loss, budget="100%", time_limit_seconds=0.5)
    step(*inputs).backward()
    plan = autoremat.stats(step).plan
    assert plan is not None
    return plan.program


def ops_of(program: Program) -> list[tuple[Any, ...]]:
    return [(o.name, o.reads, o.writes, o.in_place, o.phase, o.why, o.module, o.source, o.call) for o in program.ops]


def values_of(program: Program) -> list[Value]:
    return list(program.values)


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_program_is_that_of_a_training_step(case: Case) -> None:
    torch.manual_seed(0)
    loss, inputs = case.loss(case.model()), case.inputs()
    beforehand, training = record(loss, inputs), trained(loss, inputs)
    assert ops_of(beforehand) == ops_of(training)
    assert values_of(beforehand) == values_of(training)
    assert simulate(beforehand).peak_bytes == simulate(training).peak_bytes


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("case", [c for c in SMALL if c.name == "U-Net"], ids=str)
def test_the_floor_of_a_plan_is_a_budget_and_its_peak_is_the_measured_one(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case.model(), case.inputs()
    loss = case.loss(model)
    floor = autoremat.plan(loss, *inputs, budget="90%", timing="measure").floor_bytes
    plan = autoremat.plan(loss, *inputs, budget=floor, timing="measure")
    step = autoremat.checkpoint(loss, budget=floor)
    for _ in range(2):
        model.zero_grad()
        step(*inputs).backward()
    model.zero_grad()
    peak = account(lambda: step(*inputs).backward(), resident(model, *inputs)).peak_bytes
    stats = autoremat.stats(step)
    assert stats.plan is not None
    assert (stats.planned, stats.unplanned, stats.deviations) == (1, 0, 0)
    assert peak == stats.plan.peak_bytes == plan.peak_bytes <= floor


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=() if c.name == "U-Net" else pytest.mark.slow) for c in CASES]
)
def test_plan_and_checkpoint_accept_the_same_budgets(case: Case) -> None:
    """With all defaults: what one names as the floor, both accept, and one byte less both refuse."""
    torch.manual_seed(0)
    model, inputs = case.model(), case.inputs()
    loss = case.loss(model)
    floor = autoremat.plan(loss, *inputs, budget="90%", time_limit_seconds=0.5).floor_bytes
    with pytest.raises(autoremat.InfeasibleBudget) as beforehand:
        autoremat.plan(loss, *inputs, budget=floor - 1, time_limit_seconds=0.5)
    with pytest.raises(autoremat.InfeasibleBudget) as in_training:
        autoremat.checkpoint(loss, budget=floor - 1)(*inputs)
    assert beforehand.value.floor_bytes == in_training.value.floor_bytes == floor
    model.zero_grad()
    step = autoremat.checkpoint(loss, budget=floor)
    step(*inputs).backward()
    plan = autoremat.stats(step).plan
    assert plan is not None
    assert plan.floor_bytes == floor


def test_a_program_does_not_depend_on_where_tensors_are() -> None:
    """A tensor that came to lie where another had just been let that one's memory stay to the end of the forward."""
    x, weights = torch.randn(512, 64), [torch.randn(64, 64, requires_grad=True) for _ in range(3)]

    def loss(x: Tensor) -> Tensor:
        for weight in weights:
            x = torch.sigmoid(x @ weight)
        return x.sum()

    programs = [record(loss, (x,), timing="estimate") for _ in range(12)]
    assert {values_of(p) == values_of(programs[0]) for p in programs} == {True}
    assert {ops_of(p) == ops_of(programs[0]) for p in programs} == {True}


def test_scratch_of_kernels_is_in_a_plan() -> None:
    """Where it was only estimated, the floor of a plan was too small for ``checkpoint``."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 16, 16)
    program = autoremat.plan(model, x, budget="100%").program
    assert any(op.scratch_bytes for op in program.ops)
    estimated = autoremat.plan(model, x, budget="100%", timing="estimate").program
    assert not any(op.scratch_bytes for op in estimated.ops)


def test_autocast_is_that_of_the_training() -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.Dropout(0.5))

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(net(x)).float().square().mean()

    x = torch.randn(32, 16)
    beforehand, training = record(loss, (x,)), trained(loss, (x,))
    assert ops_of(beforehand) == ops_of(training)
    assert values_of(beforehand) == values_of(training)


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_nothing_fake_stays_in_the_cache_of_autocast(around: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoremat.engines.torch.world import apart

    monkeypatch.setattr(apart._Here, "cannot", True)
    net, x = nn.Linear(16, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        autoremat.plan(lambda x: net(net(x)).float().sum(), x, budget="100%")
        assert type(net(x)) is Tensor


def test_no_memory_is_taken() -> None:
    with torch.device("meta"):
        net = nn.Sequential(*[nn.Linear(1 << 16, 1 << 16) for _ in range(4)])
    plan = autoremat.plan(net, torch.empty(1 << 14, 1 << 16, device="meta"), budget="100%")
    assert plan.peak_bytes > 1 << 36


def test_numbers_of_fake_tensors_are_not_there() -> None:
    def loss(x: Tensor) -> Tensor:
        return (x * 2).sum() if x.sum().item() > 0 else x.sum()

    x = torch.ones(4, requires_grad=True)
    assert record(loss, (x,)).recorded == "real"
    with pytest.raises(UnusableInput, match="looks at the numbers"):
        record(loss, (torch.ones(4, device="meta", requires_grad=True),))


def test_an_operator_of_somebody_elses_is_not_known_to_be_pure() -> None:
    library = torch.library.Library("dry_run", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("dry_run::twice", torch.empty_like, lib=library)

    def loss(x: Tensor) -> Tensor:
        return torch.ops.dry_run.twice(x.detach().sin()).mul(x).sin().sum()

    program = record(loss, (torch.ones(4, requires_grad=True),))
    assert next(op for op in program.ops if "twice" in op.name).once is Once.FOREIGN
