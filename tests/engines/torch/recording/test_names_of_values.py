"""Names of values: those that a user knows, each once, the same every time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autoremat
from autoremat.program import Program


def ids(program: Program) -> list[str]:
    return [value.id for value in program.values]


def test_values_bear_the_names_of_modules_and_operators() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    found = ids(autoremat.plan(model, torch.randn(2, 4), budget=1.0).program)
    assert found[:9] == [
        "0.weight", "0.bias", "2.weight", "2.bias", "input.0", "constant", "0.addmm", "1.gelu", "2.addmm"
    ]  # fmt: skip
    assert {"0.weight.grad", "1.gelu_backward"} <= set(found)


def test_a_name_that_would_be_there_twice_has_a_number() -> None:
    def loss(x: Tensor) -> Tensor:
        return x.sin().cos().sin().cos().sum()

    found = ids(autoremat.plan(loss, torch.randn(4, requires_grad=True), budget=1.0).program)
    assert {"sin", "sin.2", "cos", "cos.2"} <= set(found)
    assert len(set(found)) == len(found)


def test_a_module_with_the_name_of_a_number_hides_nothing() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ModuleList([nn.Identity(), nn.Identity(), nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            return (self.relu[2](x.relu().relu()) * 2).sum()

    found = ids(autoremat.plan(Twice(), torch.randn(4, requires_grad=True), budget=1.0).program)
    assert len(set(found)) == len(found)


def test_names_are_the_same_in_the_next_recording() -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 4, 8)
    first, second = (ids(autoremat.plan(model, x, budget=1.0).program) for _ in range(2))
    assert first == second
