"""Attacks with modes, branches, shapes and dtypes that change, and with ``torch.func``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import (
    WIDTH,
    Net,
    check_body,
    check_step,
    curly,
    data,
    net,
    training,
)

__all__ = ["quick"]  # a fixture


@pytest.mark.slow
@pytest.mark.guard
def test_no_grad_inference_and_eval() -> None:
    def step(call: Any, x: Tensor) -> Any:
        with torch.no_grad():
            a = call(x)
        with torch.inference_mode():
            b = call(x)
        call.eval()
        c = call(x)
        c.mean().backward()
        call.train()
        d = call(x)
        d.mean().backward()
        assert not a.requires_grad
        assert b.is_inference()
        return a, b.clone(), c, d

    check_step(step, lambda: nn.Sequential(net(3), nn.Dropout(0.3), nn.BatchNorm1d(WIDTH), net(2)))


def test_inference_tensors_inside() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = torch.ones(WIDTH).exp()
        return curly(i, h) + scale

    check_body(body)


def test_evaluation_without_gradients_after_training_runs_plainly() -> None:
    model, x = net(), data()
    step = autoremat.checkpoint(lambda x, train: model(x).mean() if train else model(x).argmax(), budget=0.9)
    step(x, True).backward()
    assert torch.equal(step(x, False), model(x).argmax())


def test_branch_on_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        return curly(i, h) if h[0, 0].item() > 0 else h.sin().mul_(2).cos() * h

    def build() -> World:
        model = Net(body)
        world = training(model)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            loss = call(data()).square().mean()
            loss.backward()
            return loss

        world.step = step
        return world

    exact(build, steps=6, deviates=True)


def test_unforeseen_overwriting_of_what_a_rerun_reads() -> None:
    state = {"overwrite": False}

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.register_buffer("shift", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                h = layer(x) + self.shift
                y = (h + 1).exp().sin()
                if state["overwrite"]:
                    h.mul_(2)
                    self.shift.add_(1)
                x = y + h * 0.1
            return x

    def build() -> World:
        model, x = Overwrites(), data()

        def step(call: Any) -> Tensor:
            losses = []
            for overwrite in (False, True, False):
                state["overwrite"] = overwrite
                model.zero_grad()
                loss = call(x).square().mean()
                loss.backward()
                losses.append(loss)
            state["overwrite"] = False
            return losses

        return World(model, step)

    exact(build, steps=1, deviates=True)


def test_shapes_that_vary() -> None:
    def build() -> World:
        model = net()
        sizes = iter([200, 300, 200, 1, 250, 300] * 2)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            loss = call(torch.randn(next(sizes), WIDTH)).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build, steps=6)


def test_frozen_and_unfrozen_parameters() -> None:
    def step(call: Any, x: Tensor) -> None:
        for frozen in (True, False):
            for p in call.layers[:2].parameters():
                p.requires_grad_(not frozen)
            call(x).square().mean().backward()

    check_step(step)


def test_change_of_dtype() -> None:
    def step(call: Any, x: Tensor) -> Any:
        a = call(x).mean()
        a.backward()
        call.double()
        b = call(x.double()).mean()
        call.zero_grad()
        b.backward()
        call.float()
        call.zero_grad()
        return a, b

    check_step(step)


def test_torch_func_around() -> None:
    def step(call: Any, x: Tensor) -> Any:
        parameters = {k: v.detach() for k, v in call.named_parameters()}

        def loss(p: Any, x: Tensor) -> Tensor:
            return torch.func.functional_call(call, p, (x,)).square().mean()

        return torch.func.grad(loss)(parameters, x), torch.func.vmap(call)(x)

    check_step(step, unplanned=True)


def test_functional_call_with_computed_parameters() -> None:
    def step(call: Any, x: Tensor) -> Any:
        doubled = {k: v * 2 for k, v in call.named_parameters()}
        loss = torch.func.functional_call(call, doubled, (x,)).square().mean()
        loss.backward()
        return loss

    check_step(step)


def test_torch_func_inside() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        return curly(i, h) + torch.func.vmap(lambda r: r.sin())(h)

    check_body(body)


def test_gradient_by_torch_func_inside() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        return curly(i, h) + torch.func.grad(lambda r: r.sin().sum())(h)

    check_body(body, unplanned=True)
