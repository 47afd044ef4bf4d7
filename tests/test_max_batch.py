"""``max_batch``: the largest size by brute force, sizes of every meaning, and errors that say what to do."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.sizes import MaxBatch

pytestmark = pytest.mark.filterwarnings("ignore:.*fake tensor.*")


def mlp(depth: int = 4) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(depth)])


def rows(n: int) -> Tensor:
    return torch.randn(n, 16)


def fits(model: nn.Module, n: int, budget: int, overhead: float) -> bool:
    try:
        return autoremat.plan(model, rows(n), budget=budget).overhead <= overhead
    except autoremat.InfeasibleBudget:
        return False


@pytest.mark.one_in(3)
@pytest.mark.parametrize("overhead", [0.0, 0.1, 0.5])
def test_the_largest_and_not_one_more(overhead: float):
    model = mlp()
    found = autoremat.max_batch(model, rows, budget=20_000, overhead=overhead)
    assert [fits(model, n, 20_000, overhead) for n in (found.batch, found.batch + 1)] == [True, False]
    assert found.plan.peak_bytes <= 20_000
    assert found.plan.overhead <= overhead
    assert {t.n: t.fits for t in found.tries}[found.batch]
    assert not {t.n: t.fits for t in found.tries}[found.batch + 1]


@pytest.mark.slow
def test_more_time_allows_larger_batches():
    sizes = [autoremat.max_batch(mlp(8), rows, budget=40_000, overhead=x).batch for x in (0.0, 0.2, 1.0)]
    assert sizes == sorted(set(sizes))


@pytest.mark.slow
def test_where_the_search_begins_makes_no_difference():
    found = [autoremat.max_batch(mlp(), rows, budget=20_000, start=start) for start in (1, 7, 5000)]
    assert len({f.batch for f in found}) == 1
    assert found[2].tries[0].n == 5000


@pytest.mark.slow
@pytest.mark.guard
def test_the_tries_say_what_happened():
    found = autoremat.max_batch(mlp(), rows, budget=20_000, overhead=0.05)
    assert [t.n for t in found.tries[:3]] == [1, 2, 4]
    for t in found.tries:
        assert t.fits == (t.overhead <= 0.05)
        assert (t.peak_bytes > 20_000) == (t.overhead == float("inf"))


@pytest.mark.slow
@pytest.mark.guard
def test_the_plan_is_that_of_real_training():
    torch.manual_seed(0)
    model = mlp(8)
    found = autoremat.max_batch(model, rows, budget=60_000, overhead=1.0)
    x = rows(found.batch)
    assert autoremat.plan(model, x, budget=60_000).peak_bytes == found.plan.peak_bytes
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpointed = autoremat.checkpoint(lambda z: model(z).sum(), budget=60_000)
    checkpointed(x).backward()
    assert autoremat.stats(checkpointed).reruns > 0
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


@pytest.mark.slow
def test_the_length_of_a_sequence():
    model = GPT(GPTConfig(blocks=2, width=16, context=64))

    def loss_fn(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def tokens(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, 256, (2, n)), torch.randint(0, 256, (2, n))

    plain = autoremat.plan(loss_fn, *tokens(32), budget=1.0).plain_peak_bytes
    found = autoremat.max_batch(loss_fn, tokens, budget=plain, most=64, overhead=0.3)
    assert 32 <= found.batch <= 64


def test_most_is_the_end():
    found = autoremat.max_batch(mlp(), rows, budget="1GB", most=11)
    assert found.batch == 11
    assert max(t.n for t in found.tries) == 11


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize(
    "make_inputs",
    [
        lambda n: [torch.randn(n, 16)],
        lambda n: {"input": torch.randn(n, 16)},
        lambda n: torch.from_numpy(np.zeros((n, 16), dtype="float32")),
        lambda n: (torch.empty(n, 16, device="cpu", requires_grad=True),),
    ],
    ids=["list", "mapping", "numpy", "requires grad"],
)
def test_inputs_of_every_form(make_inputs: Callable[[int], Any]):
    assert autoremat.max_batch(mlp(), make_inputs, budget=20_000).batch > 1


@pytest.mark.slow
@pytest.mark.guard
def test_a_model_on_meta():
    with torch.device("meta"):
        model = mlp()
    found = autoremat.max_batch(model, lambda n: torch.empty(n, 16, device="meta"), budget=20_000)
    assert found.batch == autoremat.max_batch(mlp(), rows, budget=20_000).batch


@pytest.mark.slow
def test_the_optimizer_counts():
    model = mlp()
    adam = torch.optim.Adam(model.parameters())
    sizes = [autoremat.max_batch(model, rows, budget=40_000, optimizer=o).batch for o in (None, adam)]
    assert sizes[1] < sizes[0]


def test_constraints_are_passed_on():
    found = autoremat.max_batch(mlp(), rows, budget=20_000, overhead=10.0, keep="*")
    assert found.plan.overhead == 0


@pytest.mark.slow
def test_nothing_large_is_allocated():
    model = mlp()
    tracemalloc.start()
    found = autoremat.max_batch(model, rows, budget="1GB", start=1_000_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.batch > 1_000_000
    assert most < 50e6


def test_generators_are_left_as_they_were():
    model = mlp()
    before = torch.get_rng_state(), random.getstate()

    def make(n: int) -> Tensor:
        random.random()
        return rows(n)

    autoremat.max_batch(model, make, budget=20_000)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def attempt(make_inputs: Callable[[int], Any] = rows, **options: Any) -> MaxBatch:
    return autoremat.max_batch(mlp(), make_inputs, **{"budget": 20_000} | options)


def test_not_even_one_fits():
    with pytest.raises(autoremat.InfeasibleBudget, match=r"not even n = 1 fits: no schedule known") as caught:
        attempt(budget=5000)
    assert attempt(budget=caught.value.floor_bytes).batch >= 1


def test_not_even_one_is_cheap_enough():
    with pytest.raises(autoremat.InfeasibleBudget, match=r"overhead=0.0 allows \+0.0%.*allow more overhead") as caught:
        attempt(lambda n: rows(100 * n), budget=autoremat.plan(mlp(), rows(100), budget=1.0).floor_bytes, overhead=0.0)
    assert caught.value.floor_bytes <= caught.value.budget_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "lots"}, "cannot read 'lots' as a budget"),
        ({"budget": -1}, "cannot read -1"),
        ({"budget": "auto"}, "pass a number of bytes"),
        ({"budget": 0.5}, "needs a budget in bytes"),
        ({"budget": "50%"}, "needs a budget in bytes"),
        ({"overhead": -0.1}, "overhead is the largest share"),
        ({"overhead": float("nan")}, "overhead is the largest share"),
        ({"start": 0}, "start must be at least 1"),
        ({"start": 8, "most": 7}, "at most most=7"),
        ({"keep": "layers.9"}, "matches no module"),
        ({"make_inputs": lambda n: n}, r"make_inputs\(1\) returned no tensors but int"),
        ({"make_inputs": lambda n: ()}, "returned no tensors"),
        ({"make_inputs": lambda n: torch.randn(int(torch.ones(n).sum().item()), 16)}, r"make_inputs\(1\) failed under"),
        ({"make_inputs": lambda n: torch.randn(8, 16), "most": 64}, r"does make_inputs\(n\) make use of n"),
        ({"make_inputs": lambda n: torch.randn(n, 15)}, "the step with n = 1 could not be recorded.*most="),
    ],
)
def test_errors_say_what_to_do(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        attempt(**options)
