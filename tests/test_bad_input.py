"""Bad input is refused with a clear error, and the model is as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import autoremat


def network() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(6)])


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        sorted(vars(model)),
        [p.grad for p in model.parameters()],
        model.training,
    )


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    tensors, names, gradients, training = before
    assert sorted(vars(model)) == names
    assert model.training == training
    assert [p.grad for p in model.parameters()] == gradients
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "budget", [0, -5, "-3GiB", "0", 1.5, 0.0, float("nan"), "ten", "", "5 apples", None, True, [1]]
)
def test_malformed_budgets(budget: Any) -> None:
    model = network()
    before = state_of(model)
    with pytest.raises((ValueError, TypeError), match="budget"):
        autoremat.checkpoint(model, budget=budget)
    assert_untouched(model, before)
    with pytest.raises((ValueError, TypeError), match="budget"):
        autoremat.plan(model, torch.randn(2, 32), budget=budget)


def test_below_the_floor() -> None:
    model = network()
    before = state_of(model)
    autoremat.checkpoint(model, budget="1KB")
    generator = torch.get_rng_state()
    x = torch.randn(64, 32, generator=torch.Generator())
    with pytest.raises(autoremat.InfeasibleBudget) as caught:
        model(x)
    error = caught.value
    assert error.floor_bytes > error.budget_bytes == 1000
    assert error.peak_op
    assert error.largest
    assert str(error.floor_bytes) in str(error)
    assert torch.equal(generator, torch.get_rng_state())
    assert_untouched(autoremat.restore(model), before)
    autoremat.checkpoint(model, budget=error.floor_bytes)  # the floor that it names is enough
    model(x).sum().backward()


def test_a_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="no parameters that require grad"):
        autoremat.checkpoint(nn.ReLU(), budget=0.5)


def test_nothing_differentiable() -> None:
    step = autoremat.checkpoint(lambda x: x.detach() * 2, budget=0.5)
    with pytest.raises(ValueError, match="nothing that requires grad"):
        step(torch.randn(3, requires_grad=True))
    with pytest.raises(ValueError, match="nothing that requires grad"):
        autoremat.plan(lambda: 3, budget=0.5)


def test_several_devices() -> None:
    model = network()
    before = state_of(model)
    with pytest.raises(ValueError, match="several devices"):
        autoremat.plan(model, torch.randn(2, 32, device="meta"), budget=0.5)
    assert_untouched(model, before)


def test_checkpointed_already() -> None:
    model = autoremat.checkpoint(network(), budget=0.9)
    with pytest.raises(ValueError, match="restore"):
        autoremat.checkpoint(model, budget=0.5)
    step = autoremat.checkpoint(lambda x: model(x).sum(), budget=0.9)
    with pytest.raises(ValueError, match="restore"):
        autoremat.checkpoint(step, budget=0.5)


def test_not_callable_and_not_checkpointed() -> None:
    with pytest.raises(TypeError, match="module or a callable"):
        autoremat.checkpoint(3, budget=0.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="nothing to restore"):
        autoremat.restore(network())
    with pytest.raises(ValueError, match="checkpoint on it first"):
        autoremat.stats(network())


@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_inside_is_left_alone(reentrant: bool) -> None:
    """What runs inside torch.utils.checkpoint is recomputed by it; around it autoremat plans."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = network(), network(), network()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = torch_checkpoint(self.second, x, use_reentrant=reentrant)
            return self.third(x).sum()

    torch.manual_seed(0)
    plain, x = Mixed(), torch.randn(1024, 32)
    mine = autoremat.checkpoint(copy.deepcopy(plain), budget=0.9)
    for _ in range(3):
        a, b = plain(x), mine(x)
        a.backward()
        b.backward()
        assert torch.equal(a, b)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), mine.parameters(), strict=True))
    stats = autoremat.stats(mine)
    assert stats.deviations == 0
    assert stats.reruns > 0
