"""Ctrl-C between any two calls of Python: nothing of ours stays active, and the next step is exact."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one inside a __del__


def model() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.GELU()) for _ in range(3)))


SOURCES = Path(autoremat.__file__).parent
PLACES = tuple(f"autoremat/{path.relative_to(SOURCES)}" for path in SOURCES.rglob("*.py"))
"""Where Ctrl-C comes: in our files. Blocks of torch's that are generators can be left half-way, with us and without."""


class Interrupt:
    """Raises KeyboardInterrupt right after the n-th call that returns to Python."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> Interrupt:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if event == "c_return" and frame.f_code.co_filename.endswith(PLACES):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt


def gradients(net: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    torch.manual_seed(3)
    loss = call(x)
    loss.backward()
    return [loss.detach(), torch.get_rng_state(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.guard])])
@pytest.mark.parametrize("budget", ["floor", 1.0])
def test_an_interrupted_forward_leaves_nothing_active(budget: Any, every: int) -> None:
    torch.manual_seed(0)
    net, x = model(), torch.randn(64, 16)
    plain = copy.deepcopy(net)

    def loss_of(m: nn.Module) -> Any:
        return lambda x: m(x).square().mean()

    expected = gradients(plain, loss_of(plain), x)
    if budget == "floor":
        budget = autoremat.plan(loss_of(net), x, budget=1.0).floor_bytes
    step = autoremat.checkpoint(loss_of(net), budget=budget)
    for _ in range(2):
        gradients(net, step, x)
    interrupted, n = 0, 1
    while True:
        try:
            net.zero_grad()
            with Interrupt(n):
                step(x)
            break
        except KeyboardInterrupt:
            interrupted += 1
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert all(map(torch.equal, gradients(net, step, x), expected)), n
        n += every
    assert interrupted > 50 // every
    assert autoremat.stats(step).unplanned == 0
