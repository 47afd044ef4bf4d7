"""Attacks on how a checkpointed model is used: graphs, hooks, custom functions, threads, errors, copies."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import io
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import autoremat
from autoremat.engines.torch.eager.tape import Tape
from tests.run.compare import World, at_the_floor, exact, quick, seeded
from tests.run.test_hostile import ROWS, WIDTH, Net, check_body, data, training

__all__ = ["quick"]  # a fixture


def curly(i: int, h: Tensor) -> Tensor:
    return h.exp().sin() * h.cos()


def net(depth: int = 5) -> Net:
    return Net(curly, depth)


def check_step(step: Callable[[Any, Tensor], Any], model: Callable[[], nn.Module] = net, **options: Any) -> None:
    """The same model, another step: ``step(call, x)``; gradients accumulate only within a step."""

    def build() -> World:
        target, x = model(), data()

        def whole(call: Any) -> Any:
            target.zero_grad()
            return step(call, x)

        return World(target, whole)

    exact(build, **options)


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


def call_parameters(call: Any) -> Any:
    return call.parameters()


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


# ---- custom functions and hooks --------------------------------------------------------------------------------------


class Saves(torch.autograd.Function):
    """Saves input, intermediate and output; reads them twice; keeps things on ctx."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        inner = (x * scale).exp()
        out = inner.sin()
        ctx.save_for_backward(x, inner, out)
        ctx.scale, ctx.extra = scale, inner.cos()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, inner, _ = ctx.saved_tensors
        _, again, out = ctx.saved_tensors
        assert torch.equal(inner, again)
        return grad * ctx.extra * inner * ctx.scale + 0 * out + 0 * x, None


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2).sin_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * 2 * (1 - y * y).clamp(min=0).sqrt()


class ReturnsView(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(2, -1, WIDTH), x[:, ::2]

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        out = a.reshape(ROWS, WIDTH).clone()
        out[:, ::2] += b
        return out


class ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class SavesNothingButSelf(torch.autograd.Function):
    """The old way: setup_context, materialize_grads, needs_input_grad, non-differentiable outputs."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return x * w, (x > 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0) if ctx.needs_input_grad[1] else None


def test_custom_function_that_saves_and_reads_twice() -> None:
    check_body(lambda i, h: Saves.apply(h, 0.5 + i) * h.cos())


def test_custom_function_that_works_in_place() -> None:
    check_body(lambda i, h: Dirty.apply(h * 0.5) * h.cos())


def test_custom_function_that_returns_views() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        a, b = ReturnsView.apply(h.sin())
        return a.reshape(ROWS, WIDTH).cos() + torch.cat([b, b], 1).tanh()

    check_body(body)


def test_custom_function_with_setup_context() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y, mask = SavesNothingButSelf.apply(h.sin(), h.mean(0))
        return torch.where(mask, y, h).cos()

    check_body(body)


def test_custom_function_through_numpy() -> None:
    check_body(lambda i, h: ThroughNumpy.apply(h.sin() * 2).cos())


def test_numpy_reads_in_the_middle() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        scale = h.detach().numpy().mean(0)
        return (h * torch.from_numpy(scale)).sin() * h.cos() + torch.tensor(scale.tolist())

    check_body(body)


def test_numpy_writes_into_an_activation() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y.detach().numpy()[:, ::2] *= 0.5
        np.random.default_rng(0).shuffle(y.detach().numpy())
        return y.sin() * h.cos()

    check_body(body)


def test_numpy_fills_memory_that_torch_made() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = torch.zeros(ROWS, WIDTH)
        y.numpy()[:] = np.sin(h.detach().numpy())
        return (y * h).sin() * h.cos()

    check_body(body)


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


# ---- errors, leftovers, leaks ----------------------------------------------------------------------------------------


def nothing_active() -> bool:
    stack = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    module_hooks = nn.modules.module
    return not (stack or hooks or module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False])
def test_error_in_forward_leaves_nothing_behind(error: type[BaseException], first: bool) -> None:
    def build() -> World:
        bad: list[bool] = []

        def body(i: int, h: Tensor) -> Tensor:
            if i == 3 and bad:
                raise error("boom")
            return curly(i, h)

        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            for failing in (True, False) if first else (False, True, False):
                model.zero_grad()
                bad[:] = [True] * failing
                if failing:
                    with pytest.raises(error, match="boom"):
                        call(x)
                    assert nothing_active()
                else:
                    loss = call(x).square().mean()
                    loss.backward()
            return loss

        return World(model, step)

    stats = exact(build)
    assert stats.reruns > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_in_backward_leaves_nothing_behind(error: type[BaseException]) -> None:
    def build() -> World:
        bad: list[bool] = []

        def boom(g: Tensor) -> Tensor:
            if bad:
                raise error("boom")
            return g

        def body(i: int, h: Tensor) -> Tensor:
            if i == 2:
                h = h * 1
                h.register_hook(boom)
            return curly(i, h)

        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            for failing in (False, True, False):
                model.zero_grad()
                bad[:] = [True] * failing
                loss = call(x).square().mean()
                if failing:
                    with pytest.raises(error, match="boom"):
                        loss.backward()
                    assert nothing_active()
                else:
                    loss.backward()
            return loss

        return World(model, step)

    exact(build)


def test_early_exit_by_exception_carries_a_usable_graph() -> None:
    class Exit(Exception):
        pass

    def build() -> World:
        early: list[bool] = []

        def body(i: int, h: Tensor) -> Tensor:
            if i == 3 and early:
                raise Exit(h.square().mean())
            return curly(i, h)

        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            model.zero_grad()
            early.clear()
            call(x).square().mean().backward()
            model.zero_grad()
            early.append(True)
            try:
                call(x)
            except Exit as exit:
                loss = exit.args[0]
            loss.backward()
            return loss

        return World(model, step)

    exact(build, deviates=True)


def tight(build: Callable[[], World]) -> tuple[World, Any]:
    """A world with its target checkpointed at its floor."""
    budget = 1
    while True:
        world = seeded(build)
        call = autoremat.checkpoint(world.target, budget=budget, time_limit_seconds=0.1)
        try:
            world.step(call)
        except autoremat.InfeasibleBudget as error:
            budget = error.floor_bytes
        else:
            return world, call


def tensors_alive() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_abandoned_forward_is_freed_without_the_garbage_collector() -> None:
    made: list[weakref.ref[Any]] = []

    def body(i: int, h: Tensor) -> Tensor:
        y = h.exp()
        made.append(weakref.ref(y.untyped_storage()))
        return y.sin() * h.cos()

    world, call = tight(lambda: training(Net(body)))
    world.target.zero_grad()
    made.clear()
    gc.collect()
    gc.disable()
    try:
        tapes_before = sum(type(o) is Tape for o in gc.get_objects())
        y = call(data())
        assert len(made) == 5
        del y
        assert not any(ref() for ref in made)
        assert sum(type(o) is Tape for o in gc.get_objects()) == tapes_before
        call(data()).mean().backward()
        assert not any(ref() for ref in made)
        assert sum(type(o) is Tape for o in gc.get_objects()) == tapes_before
    finally:
        gc.enable()


@pytest.mark.slow
def test_number_of_tensors_stays_level_over_300_steps() -> None:
    world, call = tight(lambda: training(Net(lambda i, h: F.dropout(h, 0.1).exp().sin(), 3)))
    counts = []
    for k in range(300):
        world.step(call)
        if k % 100 == 99:
            gc.collect()
            counts.append(tensors_alive())
    assert counts[0] == counts[1] == counts[2]


def test_planning_leaves_no_tensors_behind() -> None:
    world = seeded(lambda: training(net()))
    world.step(world.target)
    autoremat.plan(net(), data(), budget=0.9)
    gc.collect()
    before = tensors_alive()
    autoremat.plan(net(), data(), budget=0.9)
    gc.collect()
    assert tensors_alive() == before


# ---- threads ---------------------------------------------------------------------------------------------------------


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


# ---- modes -----------------------------------------------------------------------------------------------------------


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


# ---- being a module --------------------------------------------------------------------------------------------------


def test_the_module_stays_what_it_was() -> None:
    model = net()
    names, signature = list(model.state_dict()), inspect.signature(model.forward)
    again = autoremat.checkpoint(model, budget=0.7, time_limit_seconds=0.1)
    assert again is model
    assert type(model) is Net
    assert isinstance(model, nn.Module)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature
    assert [n for n, _ in model.named_modules()] == [n for n, _ in net().named_modules()]
    x = data()
    model(x).mean().backward()
    model.eval().train().to("cpu").half().float()
    assert autoremat.restore(model) is model
    assert "forward" not in vars(model)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="nothing to restore"):
        autoremat.restore(model)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *[m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))]
        )

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.layers(x) * scale


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_are_checkpointed_on_their_own(how: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Plain(), data()
    autoremat.checkpoint(model, budget=0.7, time_limit_seconds=0.1)
    model(x).mean().backward()
    twin = how(model)
    twin.zero_grad()
    assert autoremat.stats(twin).calls == 0
    torch.manual_seed(1)
    twin(x).mean().backward()
    assert autoremat.stats(twin).reruns > 0
    before = autoremat.stats(model).calls
    model.zero_grad()
    torch.manual_seed(1)
    model(x).mean().backward()
    assert autoremat.stats(model).calls == before + 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q
        assert torch.equal(p.grad, q.grad)
    autoremat.restore(twin)
    assert autoremat.stats(model).plan is not None


def test_forward_replaced_before_and_restored_after() -> None:
    model, x = Plain(), data()
    plain = model.forward
    model.forward = lambda x: plain(x) * 2
    autoremat.checkpoint(model, budget=0.9, time_limit_seconds=0.1)
    torch.manual_seed(0)
    y = model(x)
    autoremat.restore(model)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)


class Trainer:
    def __init__(self) -> None:
        self.model = Plain()

    @autoremat.checkpoint(budget=0.7, time_limit_seconds=0.1)
    def loss(self, x: Tensor, *, power: int = 2) -> Tensor:
        """The loss."""
        return self.model(x).pow(power).mean()


def test_decorated_methods() -> None:
    torch.manual_seed(0)
    trainers, x = [Trainer(), Trainer()], data()
    assert Trainer.loss.__doc__ == "The loss."
    assert list(inspect.signature(Trainer.loss).parameters) == ["self", "x", "power"]
    for trainer in trainers:
        for power in (2, 4):
            trainer.model.zero_grad()
            torch.manual_seed(1)
            trainer.loss(x, power=power).backward()
            got = [p.grad for p in trainer.model.parameters()]
            trainer.model.zero_grad()
            torch.manual_seed(1)
            autoremat.restore(Trainer.loss)(trainer, x, power=power).backward()
            assert all(torch.equal(a, p.grad) for a, p in zip(got, trainer.model.parameters(), strict=True))
    assert autoremat.stats(Trainer.loss).reruns > 0


@dataclasses.dataclass
class Output:
    loss: Tensor | None
    logits: Tensor
    hidden: dict[str, list[Tensor]]


def test_nested_arguments_and_dataclass_outputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: dict[str, Any], *more: Tensor, mask: Tensor | None = None, flag: str = "") -> Output:
            h = self.net(batch["x"][0] + sum(more)) * (1 if mask is None else mask)
            return Output(None if flag else h.square().mean(), h, {"all": [h.sin(), h.cos()]})

    def step(call: Any, x: Tensor) -> Any:
        mask = torch.ones(WIDTH)
        one = call({"x": [x, None], "y": {"z": (1, "a")}}, x, x, mask=mask)
        one.loss.backward()
        two = call({"x": [x], "y": None}, flag="no loss")
        (two.logits.mean() + two.hidden["all"][1].mean()).backward()
        return one.loss, two.logits

    check_step(step, Nested)


def test_backward_under_other_modes() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).square().mean()
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            loss.backward()
        torch.set_default_dtype(torch.float64)
        try:
            call(x).square().mean().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        return loss

    check_step(step)


def test_the_floor_can_be_reached_again() -> None:
    build = lambda: training(net())  # noqa: E731
    at_the_floor(build, 2)
    at_the_floor(build, 2)


@pytest.mark.parametrize("as_view", [True, False])
def test_an_input_with_a_history_is_recorded_on_fake_tensors(as_view: bool) -> None:
    """A block in the middle of a model: where its input comes from is no part of it."""
    block = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True) * 2
    program = autoremat.plan(block, x.view(4, 8) if as_view else x, budget=1.0).program
    assert program.recorded == "fake"
