"""The first step, which has no plan yet: is it within the budget, on every kind of network?

At 60 % of the plain peak and at 1.1 times the floor: the measured peak of the first step, by the allocator's account,
and whether its loss and gradients are those of plain training. ``zoo.py`` tells the same of real architectures.

Run: ``PYTHONPATH=. python benchmarks/first_step.py``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident
from tests.zoo import CASES, Case

SHARE = 0.6
ABOVE = 1.1


@dataclass(frozen=True)
class Row:
    """One network at one budget."""

    name: str
    label: str
    budget_bytes: int
    first_bytes: int
    same: bool

    @property
    def is_within(self) -> bool:
        """Whether the first step kept the budget."""
        return self.first_bytes <= self.budget_bytes


def first_step(
    case: Case, model: nn.Module, inputs: tuple[Tensor, ...], budget: float | None
) -> tuple[int, list[Tensor]]:
    """The measured peak of one step in bytes; its loss and gradients."""
    torch.manual_seed(1)
    loss = case.loss(model)
    call = loss if budget is None else autoremat.checkpoint(loss, budget=budget)
    kept: list[Tensor] = []

    def step() -> None:
        value = call(*inputs)
        value.backward()
        kept.append(value.detach())

    peak = account(step, resident(model, *inputs)).peak_bytes
    return peak, [*kept, *(p.grad for p in model.parameters() if p.grad is not None)]


def floor_of(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """The smallest budget that a training can have."""
    call = autoremat.checkpoint(case.loss(model), budget=1.0)
    call(*inputs).backward()
    plan = autoremat.stats(call).plan
    assert plan is not None
    return plan.floor_bytes


def rows_of(case: Case) -> list[Row]:
    """A network at both budgets."""
    torch.manual_seed(0)
    model, inputs = case.model(), case.inputs()
    plain_peak, plain = first_step(case, copy.deepcopy(model), inputs, None)
    floor = floor_of(case, copy.deepcopy(model), inputs)
    rows = []
    for label, budget in ((f"{SHARE:.0%} of plain", int(SHARE * plain_peak)), (f"{ABOVE} x floor", int(ABOVE * floor))):
        try:
            peak, found = first_step(case, copy.deepcopy(model), inputs, budget)
        except autoremat.InfeasibleBudget:
            continue  # the floor is higher
        same = len(found) == len(plain) and all(map(torch.equal, found, plain))
        rows.append(Row(str(case), label, budget, peak, same))
    return rows


def main() -> None:
    """Print the table."""
    print("| network | budget | bytes | first step | of it | same bits |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = []
    for case in CASES:
        for r in rows_of(case):
            share = r.first_bytes / r.budget_bytes
            print(
                f"| {r.name} | {r.label} | {r.budget_bytes:,} | {r.first_bytes:,} | {share:.1%} | {r.same} |",
                flush=True,
            )
            rows.append(r)
    print(f"{sum(r.is_within for r in rows)} of {len(rows)} within, {sum(not r.same for r in rows)} with other bits")


if __name__ == "__main__":
    main()
