"""The example of docs/worked-example.md: X -> A1 -> A2 -> Y, keep only A1, compute A2 again."""

from __future__ import annotations

import torch
from torch import Tensor

from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.eager.tape import Reports
from autoremat.planner.search.unrolled import unroll
from autoremat.program import Plan, Program, Schedule, simulate, verify
from tests.engines.torch.follow import following, recorded


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def forward(x: Tensor, w: list[Tensor]) -> Tensor:
    a1 = torch.sigmoid(x @ w[0])
    a2 = torch.sigmoid(a1 @ w[1])
    return (a2 @ w[2]).sum()


def gradients_by_hand(x: Tensor, w: list[Tensor]) -> list[Tensor]:
    """With A1 kept and A2 computed again from it, as on paper."""
    with torch.no_grad():
        a1 = torch.sigmoid(x @ w[0])  # kept
        a2 = torch.sigmoid(a1 @ w[1])  # computed again
        dy = torch.ones(x.shape[0], 4, dtype=torch.float64)
        dw3 = a2.T @ dy
        dz2 = dy @ w[2].T * (1 - a2) * a2
        dw2 = a1.T @ dz2
        dz1 = dz2 @ w[1].T * (1 - a1) * a1
        return [x.T @ dz1, dw2, dw3]


def sigmoids(program: Program) -> list[int]:
    """The values A1 and A2."""
    return [op.writes[0] for op in program.ops if op.name == "aten.sigmoid.default"]


def plan_keeping_a1(program: Program) -> Plan:
    a1, _ = sigmoids(program)
    schedule = Schedule.from_order(program, unroll(program, frozenset({a1})))
    timeline, plain = simulate(program, schedule), simulate(program)
    return Plan(
        program,
        schedule,
        budget_bytes=timeline.peak_bytes,
        peak_bytes=timeline.peak_bytes,
        plain_peak_bytes=plain.peak_bytes,
        floor_bytes=timeline.peak_bytes,
        overhead=timeline.extra_seconds / program.seconds,
        lower_bound=0.0,
        solver="by hand",
    )


def test_gradients_by_hand_and_by_autoremat_are_equal() -> None:
    x, w = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), parameters()
    program, path = recorded(lambda x: forward(x, w), (x,))
    plan = plan_keeping_a1(program)
    assert verify(plan.program, plan) == ()
    again = [plan.program.ops[i].name for i, _ in simulate(plan.program, plan).repeats]
    assert again == ["aten.mm.default", "aten.sigmoid.default"]  # A2, from A1, and nothing else

    reruns: list[float] = []
    tape = following(plan, path, Reports(rerun=reruns.append))
    assert tape.script is not None
    assert len({v for v in tape.script.packs if v is not None}) == 1  # A1 stays, A2 goes
    with tape.forward():
        loss = forward(x, w)
    loss.backward()
    assert len(reruns) == 2
    for parameter, by_hand in zip(w, gradients_by_hand(x, w), strict=True):
        assert torch.equal(parameter.grad, by_hand)


def test_plain_autograd_agrees_with_the_hand() -> None:
    x, w = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), parameters()
    forward(x, w).backward()
    for parameter, by_hand in zip(w, gradients_by_hand(x, w), strict=True):
        assert torch.equal(parameter.grad, by_hand)


def test_a_tape_that_forgets_both_would_need_a1_too() -> None:
    """Without A1 the same request takes four runs: mm and sigmoid of both layers."""
    x, w = torch.randn(8, 4, dtype=torch.float64), parameters()
    program = record(lambda x: forward(x, w), (x,), timing="estimate")
    schedule = Schedule.from_order(program, unroll(program, frozenset()))
    assert len(schedule.order) - len(program.ops) == 4
