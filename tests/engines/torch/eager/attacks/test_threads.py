"""Attacks with several threads at once."""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, data, net, tight

__all__ = ["quick"]  # a fixture


@pytest.mark.slow
@pytest.mark.guard
def test_forwards_and_backwards_of_four_threads_at_once() -> None:
    def build() -> World:
        model = net()
        weights = [layer.weight for layer in model.layers]
        inputs = [torch.randn(ROWS // (1 + i % 2), WIDTH) for i in range(16)]

        def one(call: Any, x: Tensor) -> Any:
            x = x.clone().requires_grad_()
            return torch.autograd.grad(call(x).square().mean(), [x, *weights])

        def step(call: Any) -> Any:
            with ThreadPoolExecutor(4) as pool:
                return list(pool.map(functools.partial(one, call), inputs))

        return World(model, step)

    exact(build)


@pytest.mark.slow
@pytest.mark.guard
def test_evaluation_in_one_thread_while_another_plans() -> None:
    model, x = net(), data()
    with torch.no_grad():
        expected = model(x)
    autoremat.checkpoint(model, budget=0.7, time_limit_seconds=0.1)
    stop, wrong = threading.Event(), []

    def evaluate() -> None:
        while not stop.is_set():
            with torch.no_grad():
                y = model(x)
            if type(y) is not Tensor or not torch.equal(y, expected):
                wrong.append(y)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for rows in (10, 20, 30, 40):
            model(torch.randn(rows * 10, WIDTH)).mean().backward()
    finally:
        stop.set()
        thread.join()
    assert not wrong


@pytest.mark.parametrize("outside", [False, True])
def test_random_numbers_of_several_threads_at_once(outside: bool) -> None:
    """The gradient of a dropped element is zero: so each thread sees whether its backward has its own masks.

    When threads draw outside the step too, while it draws inside, an error is right as well; a wrong mask never is.
    """
    inputs = [data() for _ in range(40)]

    def build() -> World:
        model = net(4)

        def masked(x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.dropout(x.exp(), 0.5).sin()
            z = F.dropout(x.cos(), 0.5).exp()
            return y * z, model(y).detach()

        def one(call: Any, x: Tensor) -> bool:
            x = (data() if outside else x).requires_grad_()
            y, _ = call(x)
            try:
                (g,) = torch.autograd.grad(y.sum(), x)
            except RuntimeError as error:
                return outside and "another thread drew" in str(error)
            return bool(((y != 0) <= (g != 0)).all())

        def step(call: Any) -> bool:
            call(data().requires_grad_())
            with ThreadPoolExecutor(4) as pool:
                return all(pool.map(functools.partial(one, call), inputs))

        return World(masked, step)

    world, call = tight(build)
    assert world.step(call)
    assert autoremat.stats(call).reruns > 0
