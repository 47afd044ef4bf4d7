"""Batches of many sizes: one plan for all that are no larger, few recordings; every step exact, within its budget."""

from __future__ import annotations

import copy
import random
from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.engines.torch.eager import families
from autoremat.engines.torch.eager.inputs import input_of
from autoremat.engines.torch.eager.stats import Stats
from autoremat.engines.torch.world.memory_account import account, resident
from tests.fixed import is_thorough, random_seed

Loss = Callable[..., Tensor]


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(blocks=2, width=32, context=96))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def text(n: int, rows: int = 4) -> Tensor:
    return torch.randint(0, 256, (rows, n), generator=torch.Generator().manual_seed(n))


def plain_peak(model: nn.Module, *inputs: Any, loss: Loss = loss_of) -> int:
    return autoremat.plan(lambda: loss(model, *inputs), budget=1.0, timing="measure").plain_peak_bytes


def train(
    model: nn.Module, batches: Sequence[tuple[Any, ...]], loss: Loss = loss_of, **options: Any
) -> tuple[Stats, list[int]]:
    """Train a copy plainly and one under autoremat side by side; statistics, and the peak of every step."""
    plain, mine = copy.deepcopy(model), copy.deepcopy(model)
    step = autoremat.checkpoint(lambda *batch: loss(mine, *batch), **options)
    peaks = []
    for k, batch in enumerate(batches):
        results: list[Tensor] = []
        for m, call in ((plain, lambda *b: loss(plain, *b)), (mine, step)):
            m.zero_grad()
            torch.manual_seed(k)

            def go(call: Loss = call, batch: tuple[Any, ...] = batch) -> None:
                out = call(*batch)
                out.backward()
                results.append(out.detach())  # noqa: B023

            measured = account(go, resident(m, *(x for x in batch if isinstance(x, Tensor))))
        peaks.append(measured.peak_bytes)
        assert torch.equal(*results), k
        for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), k
            assert p.grad is None or torch.equal(p.grad, q.grad), k
    return autoremat.stats(step), peaks


@pytest.mark.slow
@pytest.mark.guard
def test_smaller_batches_go_by_the_plan_of_the_larger_one() -> None:
    model = gpt()
    budget = int(0.7 * plain_peak(model, text(64)))
    stats, peaks = train(model, [(text(n),) for n in (64, 40, 63, 8, 64, 33)], budget=budget)
    assert (stats.planned, stats.deviations, stats.unplanned) == (1, 0, 0)
    assert max(peaks[1:]) <= budget


@pytest.mark.slow
@pytest.mark.guard
def test_when_sizes_grow_a_plan_for_larger_ones_is_there_before_they_come() -> None:
    model = gpt()
    budget = int(0.7 * plain_peak(model, text(90)))
    stats, peaks = train(model, [(text(n),) for n in (40, 48, 50, 66, 71, 84, 90)], budget=budget)
    assert stats.planned <= 3  # of two recordings, and of what they foresee
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert max(peaks[2:]) <= budget


@pytest.mark.slow
def test_smaller_sizes_are_foreseen_once_their_own_plan_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FORESEEN_PAYS", 0.0)
    model = gpt()
    budget = int(0.7 * plain_peak(model, text(90)))
    stats, peaks = train(model, [(text(n),) for n in (84, 90, 20, 20, 24, 20, 88)], budget=budget)
    assert stats.planned > 3  # of two recordings, of what they foresee of larger inputs, and of smaller ones
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert max(peaks[2:]) <= budget


@pytest.mark.slow
def test_numbers_text_and_lists_do_not_make_new_kinds() -> None:
    model = gpt()

    def loss(m: nn.Module, x: Tensor, weight: float, name: str, step: int, boxes: list[Tensor]) -> Tensor:
        return loss_of(m, x) * weight + torch.cat(boxes).sum() * 0

    batches = [
        (text(32), k / 7, f"file {k}.txt", k, [torch.ones(1 + (j + k) % 3, 4) for j in range(2 + k % 2)])
        for k in range(16)
    ]
    stats, _ = train(model, batches, loss, budget=1.0)
    assert stats.planned <= 7
    assert (stats.deviations, stats.unplanned) == (0, 0)


@pytest.mark.slow
def test_a_number_that_decides_which_calls_are_made_makes_kinds() -> None:
    model = gpt()

    def loss(m: nn.Module, x: Tensor, mode: int) -> Tensor:
        return loss_of(m, x) if mode % 2 else m(x).sin().mean()

    stats, _ = train(model, [(text(32), k % 4) for k in range(12)], loss, budget=0.8)
    assert (stats.plans, stats.deviations, stats.unplanned) == (4, 0, 0)


def test_a_share_of_the_peak_is_settled_by_the_first_plan() -> None:
    model = gpt()
    step = autoremat.checkpoint(lambda x: loss_of(model, x), budget=0.6)
    given = []
    for x in (text(64), text(64), text(8, rows=1)):
        model.zero_grad()
        step(x).backward()
        given.append(autoremat.stats(step).plan.budget_bytes)
    assert len(set(given)) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("from_file", [True, False])
def test_a_plan_made_of_the_largest_input_serves_all(from_file: bool, tmp_path: Path) -> None:
    model = gpt()
    budget = int(0.7 * plain_peak(model, text(80)))
    plan: Any = autoremat.plan(lambda x: loss_of(model, x), text(80), budget=budget, timing="measure")
    if from_file:
        plan.to_json(tmp_path / "plan.json")
        plan = str(tmp_path / "plan.json")
    stats, peaks = train(model, [(text(n),) for n in (30, 70, 11, 80, 79)], plan=plan)
    assert (stats.planned, stats.deviations, stats.unplanned) == (0, 0, 0)
    assert stats.reruns > 0
    assert max(peaks) <= budget


def test_a_plan_of_something_else_is_not_followed() -> None:
    model = gpt()
    plan = autoremat.plan(lambda x: loss_of(model, x), text(16), budget="1MB")
    step = autoremat.checkpoint(lambda x: loss_of(model, x), plan=plan)
    with pytest.warns(RuntimeWarning, match="made of another model, or of a smaller input"):
        step(text(24)).backward()
    assert autoremat.stats(step).planned == 1


def test_a_budget_or_a_plan() -> None:
    with pytest.raises(ValueError, match="either a budget or a plan"):
        autoremat.checkpoint(lambda x: x)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_any_sizes_in_any_order(number: int) -> None:
    dice = random.Random(random_seed(number))
    model = gpt()
    sizes = [(dice.randint(2, 90), dice.randint(2, 6)) for _ in range(24 if is_thorough() else 10)]
    longest, most = max(n for n, _ in sizes), max(rows for _, rows in sizes)
    budget = int(dice.uniform(0.55, 0.9) * plain_peak(model, text(longest, most)))
    stats, peaks = train(model, [(text(n, rows),) for n, rows in sizes], budget=budget)
    records, seen = 0, list[tuple[int, int]]()
    for size in sizes:
        records += not any(size[0] <= n and size[1] <= rows for n, rows in seen)
        seen.append(size)
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.planned <= 2 * records
    assert sum(p > budget for p in peaks) <= records / 10, [p / budget for p in peaks]


@dataclass
class Batch:
    """A batch as many trainings have it."""

    x: Tensor
    names: list[str]
    boxes: list[Tensor]
    scale: float
    parent: Any = None


class Named(NamedTuple):
    """The same, a tuple with names."""

    x: Tensor
    names: list[str]
    boxes: list[Tensor]
    scale: float


@pytest.mark.parametrize("kind", [dict, UserDict, Batch, lambda **parts: {"batch": Named(**parts)}])
def test_lists_inside_of_a_batch_and_batches_that_are_objects_make_no_new_kinds(kind: Callable[..., Any]) -> None:
    def batch(n: int) -> Any:
        x, boxes = torch.randn(n, 8), [torch.rand(1 + i, 4) for i in range(n)]
        return kind(x=x, names=[f"{i}.png" for i in range(n)], boxes=boxes, scale=1 / n)

    form, sizes = input_of(print, (batch(9),), {})
    for n in (2, 5, 8):
        smaller, its_sizes = input_of(print, (batch(n),), {})
        assert smaller == form
        assert its_sizes.fits_into(sizes)
        assert its_sizes.elements == n * 8 + sum(4 * (1 + i) for i in range(n))
        assert not sizes.fits_into(its_sizes)


def test_objects_inside_of_objects_are_not_looked_into() -> None:
    inner = Batch(torch.randn(3, 8), [], [], 1.0)
    inner.parent = Batch(torch.randn(5, 8), [], [], 1.0, inner)  # a circle
    assert input_of(print, (inner,), {})[1].elements == 3 * 8
