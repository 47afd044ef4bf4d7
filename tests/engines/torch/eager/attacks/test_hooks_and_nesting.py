"""Attacks with hooks, with what outlives a step, and with checkpointed parts inside of others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import (
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
def test_module_and_tensor_hooks() -> None:
    def build() -> World:
        model = net()
        seen: list[Tensor] = []
        model.layers[0].register_forward_hook(lambda m, a, out: out * 1.5)
        model.layers[1].register_forward_pre_hook(lambda m, a: (a[0].sin(),))
        model.layers[2].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
        model.layers[3].register_full_backward_pre_hook(lambda m, go: (go[0] * 2,))
        model.layers[4].register_forward_hook(lambda m, a, out: seen.append(out.detach().mean()) or None)
        model.layers[4].register_forward_hook(lambda m, a, out: out.register_hook(lambda g: g * 3) and None)
        model.layers[0].weight.register_hook(lambda g: g * 0.5)
        world = training(model)
        world.extra = lambda: list(seen)
        return world

    exact(build, steps=3)


def test_hooks_of_the_other_kinds() -> None:
    """On all modules, with keywords, called in any case, on several gradients at once, on nodes, on leaves."""

    def build() -> World:
        model, seen = net(), list[Any]()

        def see(what: str) -> Callable[..., None]:
            return lambda *_: seen.append(what)

        model.layers[0].register_forward_pre_hook(lambda m, a, k: ((a[0] * 2,), k), with_kwargs=True)
        model.layers[1].register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True)
        model.layers[2].register_forward_hook(see("always"), always_call=True)
        model.layers[3].weight.register_post_accumulate_grad_hook(see("accumulated"))

        def step(call: Any) -> Any:
            model.zero_grad()
            x = data().requires_grad_()
            with contextlib.ExitStack() as stack:
                for register, hook in (
                    (nn.modules.module.register_module_forward_pre_hook, lambda m, a: (a[0].sin(),)),
                    (nn.modules.module.register_module_forward_hook, lambda m, a, out: out.cos()),
                    (nn.modules.module.register_module_full_backward_pre_hook, lambda m, go: (go[0] * 2,)),
                    (nn.modules.module.register_module_full_backward_hook, lambda m, gi, go: (gi[0] * 3,)),
                ):
                    stack.callback(register(hook).remove)
                y = call(x)
                torch.autograd.graph.register_multi_grad_hook((x, y), see("several"))
                y.grad_fn.register_prehook(lambda gradients: (gradients[0] * 2,))
                y.grad_fn.register_hook(see("node"))
                y.square().mean().backward()
            return y, x.grad

        return World(model, step, extra=lambda: seen)

    exact(build, steps=3)


def test_activations_left_on_the_module() -> None:
    """They are there after the forward, with their graph, and train like everything else."""

    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(self._body)
            self.last: dict[int, Tensor] = {}

        def _body(self, i: int, h: Tensor) -> Tensor:
            self.last[i] = h.exp()
            return self.last[i].sin() * h.cos()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def step(call: Any, x: Tensor) -> Any:
        loss = call(x).mean()
        (loss + call.last[1].square().mean()).backward()
        return loss, dict(call.last)

    check_step(step, Leaves)


@pytest.mark.parametrize("turns", [True, False])
def test_two_models(turns: bool) -> None:
    """A generator and its critic, each checkpointed: in turns, and one through the other with its weights frozen."""

    def build() -> World:
        maker, critic = net(2), net(2)

        def step(call: Any) -> Any:
            judge = autoremat.checkpoint(critic, budget=0.7) if call is not maker or is_checkpointed(maker) else critic
            try:
                return losses(call, judge)
            finally:
                if judge is critic and is_checkpointed(critic):
                    autoremat.restore(critic)

        def losses(call: Any, judge: Any) -> Any:
            maker.zero_grad(), critic.zero_grad()
            noise, real = data(), data()
            fake = call(noise)
            judged = judge(fake.detach()).mean() - judge(real).mean()
            if turns:
                judged.backward()
            critic.requires_grad_(False)
            through = judge(fake).square().mean()
            critic.requires_grad_(True)
            through.backward()
            if not turns:
                judged.backward()
            return judged, through

        return World(maker, step, (critic,))

    exact(build)


def is_checkpointed(model: nn.Module) -> bool:
    return "forward" in vars(model)


def test_lists_that_outlive_the_step() -> None:
    def build() -> World:
        kept: list[Tensor] = []
        table: dict[str, Any] = {"all": []}

        def body(i: int, h: Tensor) -> Tensor:
            kept.append(h.exp())
            table["all"].append(kept[-1].detach())
            table[str(i)] = h
            return kept[-1].sin() * h.cos()

        world = training(Net(body))
        plain = world.step

        def step(call: Any) -> Any:
            loss = plain(call)
            assert len(kept) == 5
            assert len(table["all"]) == 5
            copies = [*kept, *table["all"]]
            kept.clear(), table["all"].clear()
            return loss, copies

        world.step = step
        return world

    exact(build, steps=3)


def test_losses_collected_on_the_side() -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = net(), []
            for layer in self.net.layers:
                layer.register_forward_hook(lambda m, a, out: self.losses.append(out.square().mean()))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).mean() + sum(call.losses)
        assert len(call.losses) == 5
        call.losses.clear()
        loss.backward()
        return loss

    check_step(step, Sides)


def test_outputs_that_are_inputs_and_views_of_inputs() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return x, x.t(), self.net(x), y, None, 3

    def step(call: Any, x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        a, b, c, d, e, f = call(x, y=x)
        assert a is x
        assert d is x
        assert (e, f) == (None, 3)
        (a.sin().sum() + b.cos().sum() + c.mean()).backward()
        return x.grad

    check_step(step, Through)


@pytest.mark.parametrize("reentrant", [True, False])
def test_torch_checkpoint_inside(reentrant: bool) -> None:
    def body(i: int, h: Tensor) -> Tensor:
        if i % 2:
            return curly(i, F.dropout(h, 0.2))
        return torch_checkpoint(lambda t: curly(i, F.dropout(t, 0.2)), h, use_reentrant=reentrant)

    check_body(body, steps=3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_inside_torch_checkpoint(reentrant: bool) -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        loss = torch_checkpoint(call, x, use_reentrant=reentrant).square().mean()
        loss.backward()
        return loss, x.grad

    check_step(step, unplanned=not reentrant, reruns=reentrant)


def test_users_hooks_on_saved_tensors_inside() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        if i % 2:
            return curly(i, h)
        with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
            return curly(i, h)

    check_body(body)


def test_users_hooks_on_saved_tensors_around() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: t.half() if t.is_floating_point() else t, lambda t: t.float()):
            loss = call(x).square().mean()
        loss.backward()
        return loss

    check_step(step, unplanned=True)


def test_save_on_cpu_around() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        with save_on_cpu():
            loss = call(x).square().mean()
        loss.backward()
        return loss

    check_step(step, unplanned=True)


def test_saved_tensors_looked_at_outside_the_backward() -> None:
    def step(call: Any, x: Tensor) -> Any:
        y = call(x)
        looked: list[Tensor] = []
        for _ in range(2):
            pending, seen = [y.grad_fn], set()
            while pending:
                node = pending.pop()
                if node is None or node in seen:
                    continue
                seen.add(node)
                pending += [n for n, _ in node.next_functions]
                saved = [getattr(node, a) for a in dir(node) if a.startswith("_saved_")]
                looked += [t.clone() for t in saved if isinstance(t, Tensor)]
        y.square().mean().backward()
        return looked

    check_step(step)


def test_anomaly_mode() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).square().mean()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        check_step(step)


# ---- nesting ---------------------------------------------------------------------------------------------------------


def test_checkpointed_submodule_inside_a_checkpointed_module() -> None:
    def model() -> nn.Module:
        outer = nn.Sequential(net(3), net(3))
        autoremat.checkpoint(outer[1], budget=0.9)
        return outer

    check_step(lambda call, x: call(x).square().mean().backward(), model)


def test_recursion() -> None:
    def build() -> World:
        model, x = net(4), data()
        box: dict[str, Any] = {}

        def recurse(x: Tensor, depth: int) -> Tensor:
            x = curly(0, model.layers[depth](x))
            return x if depth == 0 else box["call"](x, depth - 1)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            box["call"] = call
            loss = call(x, 3).square().mean()
            loss.backward()
            return loss

        return World(recurse, step, (model,))

    exact(build)
