"""A plan saved by one process, carried out by another: the same bits, within its budget, or refused in words."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

MODEL = """
import torch
from torch import nn

def model(width=32):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1)) for _ in range(6)]
    return nn.Sequential(*layers, Loss())

class Loss(nn.Module):
    def forward(self, x):
        return x.square().sum()

def batch(rows=256, width=32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
"""
SAVE = (
    MODEL
    + """
import sys, autoremat
plan = autoremat.plan(model(), batch(), budget=0.7)
plan.to_json(sys.argv[1])
"""
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan, saved by another process."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    subprocess.run([sys.executable, "-c", SAVE, str(path)], check=True)
    return path


def of_file() -> dict[str, object]:
    names: dict[str, object] = {}
    exec(MODEL, names)
    return names


@pytest.mark.slow
@pytest.mark.guard
def test_it_is_followed_bit_for_bit_and_within_its_budget(path: Path) -> None:
    names = of_file()
    plain, mine, x = names["model"](), names["model"](), names["batch"]()  # type: ignore[operator]
    autoremat.checkpoint(mine, plan=path)
    plan = autoremat.Plan.from_json(path)
    assert any(n > 1 for n in plan.schedule.runs_of.values())
    for _ in range(3):
        results = []
        for model in (plain, mine):
            torch.manual_seed(5)
            model.zero_grad()
            loss: list[torch.Tensor] = []
            measured = account(lambda m=model, out=loss: (out.append(m(x)), out[0].backward()), resident(model, x))
            results.append((loss[0].detach(), *(p.grad.clone() for p in model.parameters())))
        assert all(map(torch.equal, *results))
        assert measured.peak_bytes <= plan.budget_bytes
    stats = autoremat.stats(mine)
    assert stats.plan is not None
    assert stats.plan.schedule == plan.schedule
    assert stats.deviations == stats.unplanned == 0


@pytest.mark.parametrize("other", [lambda n: nn.Sequential(nn.Linear(32, 32), nn.Tanh()), lambda n: n["model"]()])
def test_it_is_refused_in_words_for_another_model_or_a_larger_input(path: Path, other) -> None:  # type: ignore[no-untyped-def]
    names = of_file()
    mine = autoremat.checkpoint(other(names), plan=path)
    x = names["batch"](257)  # type: ignore[operator]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine(x).sum().backward()
    said = [str(w.message) for w in caught]
    assert any("the plan that was given is not for this step" in text for text in said), said


def one_head(x: torch.Tensor) -> torch.Tensor:
    """Attention of one head: steps along that dimension say nothing, and fake kernels choose others."""
    heads = x.view(*x.shape[:2], 1, -1).transpose(1, 2)
    seen = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    return seen.reshape(seen.shape).transpose(1, 2).tanh().square().sum()


def test_it_is_followed_where_fake_kernels_give_other_steps_that_mean_nothing() -> None:
    x = torch.randn(8, 64, 16, requires_grad=True)
    mine = autoremat.checkpoint(one_head, plan=autoremat.plan(one_head, x, budget=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(x).backward()


class OnAnotherPath(nn.Module):
    """Looks at what it is given, as libraries do with masks: on fake tensors another call comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0 if isinstance(x, FakeTensor) else x + bool((x == 0).all())
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.square().sum()


def test_where_real_numbers_take_another_path_its_choices_are_where_the_planning_begins() -> None:
    x = torch.randn(512, 32)
    plan = autoremat.plan(OnAnotherPath(), x, budget=0.6)
    alone = autoremat.checkpoint(OnAnotherPath(), budget=plan.budget_bytes)
    mine = autoremat.checkpoint(OnAnotherPath(), plan=plan)
    alone(x).backward()
    with pytest.warns(RuntimeWarning, match="from what the given plan recomputes"):
        mine(x).backward()
    followed = autoremat.stats(mine).plan
    greedy = autoremat.stats(alone).plan
    assert followed is not None
    assert greedy is not None
    assert len(followed.program.ops) != len(plan.program.ops)
    assert followed.peak_bytes <= plan.budget_bytes
    assert followed.overhead <= plan.overhead + 0.004 < greedy.overhead
