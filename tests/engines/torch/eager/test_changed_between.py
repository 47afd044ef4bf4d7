"""Parameters that change between a forward and its backward: as in plain training, or an error as there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import autoremat

ROWS, WIDTH, CHANGED_AT, STEPS = 2048, 32, 4, 6


def other_memory(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 0.9


def one_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 0.9, model.parameters())


def other_buffers(model: nn.Module) -> None:
    for b in model.buffers():
        b.data = b.data * 0.9


def other_parameters(model: nn.Module) -> None:
    model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()}, assign=True)


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: t * 0.9 for name, t in model.state_dict().items()})


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.scale)


def trained(budget: str | None, change: Callable[[nn.Module], None]) -> list[Tensor | None]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Scaled() for _ in range(6)))
    call = model if budget is None else autoremat.checkpoint(model, budget=budget)
    found: list[Tensor | None] = []
    for k in range(STEPS):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(k))
        loss = call(x).square().mean()
        if k == CHANGED_AT:
            change(model)
        loss.backward()
        found += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
    if budget is not None:
        assert autoremat.stats(call).reruns
    return found


@pytest.mark.parametrize("change", [other_memory, one_vector, other_buffers, other_parameters])
def test_reruns_read_what_the_first_run_has_read(change: Callable[[nn.Module], None]) -> None:
    """They read what was there by then, so that gradients were wrong, without a word."""
    for mine, plain in zip(trained("60%", change), trained(None, change), strict=True):
        assert (mine is None) == (plain is None)
        assert mine is None or (plain is not None and torch.equal(mine, plain))


@pytest.mark.parametrize("budget", [None, "60%"])
def test_what_is_modified_in_place_is_an_error(budget: str | None) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(budget, loaded)
