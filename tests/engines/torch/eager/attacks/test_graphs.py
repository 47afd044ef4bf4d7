"""Attacks on how the graph of a checkpointed model is used, and on what changes before its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, quick, seeded
from tests.engines.torch.eager.attacks.networks import (
    ROWS,
    Net,
    call_parameters,
    check_step,
    curly,
    data,
    net,
)

__all__ = ["quick"]  # a fixture

# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_several_outputs_and_a_loss_from_two_of_three() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b, self.c = net(3), net(2), net(2), net(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.trunk(x)
            return self.a(h), self.b(h), self.c(h)

    def step(call: Any, x: Tensor) -> Tensor:
        a, _, c = call(x)
        loss = a.mean() * 2 + c.square().mean()
        loss.backward()
        return loss

    check_step(step, Three)


@pytest.mark.one_in(4, guard=True)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("retain", [True, False])
def test_outputs_backpropagated_one_by_one_in_any_order(order: tuple[int, ...], retain: bool) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.heads = net(3), nn.ModuleList(net(3) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            h = self.trunk(x) if retain else x
            return [head(h) for head in self.heads]

    def step(call: Any, x: Tensor) -> None:
        outputs = call(x)
        for i in order:
            outputs[i].square().mean().backward(retain_graph=retain and i != order[-1])

    check_step(step, Three)


def test_part_of_the_graph_is_never_backpropagated() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        y = call(x)
        call(x * 2)
        y[: ROWS // 2].mean().backward()
        return y

    check_step(step)


def test_autograd_grad_and_backward_with_inputs() -> None:
    def step(call: Any, x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        some = list(call_parameters(call))[:3]
        grads = torch.autograd.grad(call(x).square().mean(), [x, *some])
        call(x).square().mean().backward(inputs=[x, some[1]])
        return grads, x.grad

    check_step(step)


def test_graph_retained_twice() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        return loss

    check_step(step)


def test_gradient_penalty_outside() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = call(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        loss = y.mean() + (g.norm(dim=1) - 1).square().mean()
        loss.backward()
        return loss

    check_step(step)


def test_gradient_penalty_inside() -> None:
    def build() -> World:
        model, x = net(), data()

        def loss(x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            y = model(x)
            (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            return y.mean() + (g.norm(dim=1) - 1).square().mean()

        def step(call: Any) -> Tensor:
            model.zero_grad()
            out = call(x)
            out.backward()
            return out

        return World(loss, step, (model,))

    exact(build)


def test_adversarial_step_inside_frees_its_graph() -> None:
    def build() -> World:
        model, x = net(), data()

        def loss(x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(x).square().mean(), x)
            return model(x.detach() + 0.1 * g.sign()).square().mean()

        def step(call: Any) -> Tensor:
            model.zero_grad()
            out = call(x)
            out.backward()
            return out

        return World(loss, step, (model,))

    exact(build, reruns=False)


def test_hessian_vector_product_and_third_derivative() -> None:
    def step(call: Any, x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(call(x).square().mean(), x, create_graph=True)
        (h,) = torch.autograd.grad((g * x).sum(), x, create_graph=True)
        (t,) = torch.autograd.grad(h.square().sum(), x)
        return g, h, t

    check_step(step, lambda: net(3))


@pytest.mark.slow
@pytest.mark.guard
def test_gradients_accumulate_over_forwards_in_any_order() -> None:
    def step(call: Any, x: Tensor) -> None:
        losses = [call(x * k).square().mean() for k in (1, 2, 3, 4)]
        for i in (2, 0, 3, 1):
            losses[i].backward()

    check_step(step, waits=True)
    check_step(lambda call, x: sum(call(x * k).square().mean() for k in (1, 2, 3)).backward(), waits=True)


def test_gradients_kept_from_the_step_before() -> None:
    def build() -> World:
        model, x = net(), data()

        def step(call: Any) -> Tensor:
            loss = call(x).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build, steps=3)


def test_inputs_that_come_from_a_graph() -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net(2), net(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    def build() -> World:
        first, second, x = net(2), net(4), data()

        def step(call: Any) -> Tensor:
            first.zero_grad(), second.zero_grad()
            h = first(x)
            loss = (call(h) + call(h.sin()) + h).square().mean()
            loss.backward()
            return loss

        return World(second, step, (first,))

    exact(build)


@pytest.mark.parametrize("branch", [False, True])
def test_tensor_of_an_outer_graph_in_a_closure_is_refused_not_broken(branch: bool) -> None:
    def build() -> World:
        first, second, x = net(2), net(4), data()
        box: dict[str, Tensor] = {}

        def loss() -> Tensor:
            if branch and box["h"].sum().item() > 1e9:
                return box["h"].sum()
            return second(box["h"]).square().mean()

        def step(call: Any) -> Tensor:
            first.zero_grad(), second.zero_grad()
            box["h"] = first(x)
            out = call()
            out.backward()
            return out

        return World(loss, step, (first, second))

    exact(build, unplanned=None)


@pytest.mark.parametrize("branch", [False, True])
def test_hooks_on_parameters_that_step_an_optimizer_in_the_backward(branch: bool) -> None:
    def build() -> World:
        def body(i: int, h: Tensor) -> Tensor:
            return h if branch and h.sum().item() > 1e9 else curly(i, h)

        model, x = Net(body), data()
        optimizers = {p: torch.optim.Adam([p], 0.01) for p in model.parameters()}

        def hook(p: Tensor) -> None:
            optimizers[p].step()
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)

        def step(call: Any) -> Any:
            loss = call(x).square().mean()
            loss.backward()
            return loss, list(model.parameters())

        world = World(model, step)
        world.extra = lambda: [s for o in optimizers.values() for s in o.state.values()]
        return world

    exact(build, steps=3)


# ---- changes between forward and backward ----------------------------------------------------------------------------


def outcome(build: Callable[[], World]) -> Any:
    """The result of a step, or the error it ends in."""

    def guarded() -> World:
        world = build()
        plain = world.step

        def step(call: Any) -> Any:
            try:
                return plain(call)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                for root in world.roots():
                    root.zero_grad()
                return "modified"

        world.step = step
        return world

    return guarded


@pytest.mark.parametrize("what", ["output", "hidden", "input", "weight", "bias"])
@pytest.mark.parametrize("allowed", [True, False])
def test_change_in_place_between_forward_and_backward(what: str, allowed: bool) -> None:
    """Either the error of autograd, or exact; never silently something else."""
    hidden: list[Tensor] = []

    def body(i: int, h: Tensor) -> Tensor:
        if i == 2:
            hidden.append(h)
        return h.sin() if allowed else h.exp()

    def build() -> World:
        model, x = Net(body, 4), data()

        def step(call: Any) -> Any:
            model.zero_grad()
            hidden.clear()
            leaf = x.clone().requires_grad_()
            inner = leaf * 1
            y = call(inner)
            y = y if allowed else y.exp()
            with torch.no_grad():
                if what == "output":
                    y.mul_(2)
                elif what == "hidden":
                    hidden[-1].mul_(2)
                elif what == "input":
                    inner.mul_(2)
                elif what == "weight":
                    model.layers[2].weight.mul_(2)
                else:
                    model.layers[2].bias.mul_(2)
            y.sum().backward()
            return y, leaf.grad

        return World(model, step)

    world = seeded(outcome(build))
    plain = world.step(world.target)
    for budget in (0.7, 0.5):
        world = seeded(outcome(build))
        try:
            got = world.step(autoremat.checkpoint(world.target, budget=budget, time_limit_seconds=0.1))
        except autoremat.InfeasibleBudget:
            continue
        if got == "modified":
            continue  # refused: autoremat may need what autograd does not
        assert plain != "modified", "silent"
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_optimizer_step_between_forward_and_backward_is_an_error() -> None:
    def step(call: Any, x: Tensor) -> None:
        optimizer = torch.optim.SGD(call_parameters(call), 0.1)
        first, second = call(x).square().mean(), call(x * 2).square().mean()
        first.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            second.backward()
        for p in call_parameters(call):
            p.grad = None

    check_step(step)
