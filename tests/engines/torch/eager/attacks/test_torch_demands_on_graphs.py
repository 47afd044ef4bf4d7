"""What PyTorch's tests ask of ``torch.utils.checkpoint``: arguments and graphs (see ``test_torch_demands``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.demands import (
    Floor,
    all_nodes,
    assert_the_graph_dies,
    chain,
    differentiates_inside,
    grad,
    nested_ways,
    smooth,
)
from tests.engines.torch.eager.attacks.networks import WIDTH, check_step, data, net

__all__ = ["quick"]  # a fixture

# ---- arguments and results -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
def test_arguments_and_results_of_any_kind() -> None:
    def step(t: dict[str, Any], none: None, k: int, f: Callable[[Tensor], Tensor], *, scale: Any = None) -> Any:
        x, (y, z) = t["x"], t["rest"]
        a = f(k * x * y.exp()) + z
        b = x * y + z
        a *= k
        b *= k
        if scale is not None:
            a = (a * scale).sin()
        return {"k": k, "a": [a.exp(), none, True], "text": "bar"}, b.sin(), x

    x, y, s = (torch.rand(64, 64, requires_grad=True) for _ in range(3))
    z = torch.rand(64, 64)
    found = []
    for call in (step, Floor(step)):
        for scale in (None, s):
            for t in (x, y, s):
                t.grad = None
            kinds, b, same = call({"x": x, "rest": (y, z)}, None, 3, chain, scale=scale)
            assert (kinds["k"], kinds["a"][1:], kinds["text"]) == (3, [None, True], "bar")
            assert same is x
            kinds["a"][0].sum().backward(retain_graph=True)
            b.sum().backward(retain_graph=True)
            same.sum().backward()
            (b + kinds["a"][0]).sum().backward()
            with pytest.raises(RuntimeError, match="second time"):
                b.sum().backward()
            found.append((x.grad, y.grad, s.grad, b.detach(), kinds["a"][0].detach()))
    for plain, got in zip(found[:2], found[2:], strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, got, strict=True))


def test_results_without_gradients() -> None:
    """One of two is fine. None at all: there is no step to plan, so it says so, or runs plainly if it has trained."""
    x, y = torch.rand(4, 4, requires_grad=True), torch.rand(4, 4)
    both = autoremat.checkpoint(lambda a, b: (a * 1, b), budget=1.0)
    first, second = both(x, y)
    assert second is y
    first.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 4))

    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.frozen = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(not self.frozen):
                return self.inner(x).sin()

    model = autoremat.checkpoint(NoGrad(), budget=1.0)
    model.frozen = True
    with pytest.raises(ValueError, match="nothing that requires grad"):
        model(x)
    model.frozen = False
    model(x).sum().backward()
    model.frozen, x.grad = True, None
    for _ in range(3):
        out = model(x + 0)
        assert not out.requires_grad
        (out + x).sum().backward()
    with pytest.raises(ValueError, match="nothing that requires grad"):
        autoremat.checkpoint(lambda a, b: a * b, budget=1.0)(0.5, 2)  # no tensors at all


def test_view_of_an_integer_input_is_a_result() -> None:
    step = Floor(lambda i, y: (i.view(-1), chain(y)))
    i, y = torch.tensor([[1], [2], [3]]), torch.randn(64, 64, requires_grad=True)
    for _ in range(2):
        flat, out = step(i, y)
        assert flat.tolist() == [1, 2, 3]
        assert flat.data_ptr() == i.data_ptr()
        (got,) = torch.autograd.grad(out.sum(), y)
        assert torch.equal(got, torch.autograd.grad(chain(y).sum(), y)[0])


def test_wrapper_subclass() -> None:
    """A tensor whose operators are somebody else's: what involves it stays."""

    class Wrapper(Tensor):
        inner: Tensor

        @staticmethod
        def __new__(cls, inner: Tensor) -> Wrapper:
            return Tensor._make_wrapper_subclass(
                cls, inner.size(), inner.stride(), dtype=inner.dtype, device=inner.device,
                requires_grad=inner.requires_grad,
            )  # fmt: skip

        def __init__(self, inner: Tensor) -> None:
            self.inner = inner.detach()

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
            return torch.utils._pytree.tree_map_only(Tensor, cls, func(*args, **kwargs))

    def step(x: Tensor) -> Tensor:
        view = (x * x.sum()).view(-1).view(4, 3)
        return (view.exp().sin() * view.cos()).sum()

    inner = torch.randn(4, 3)
    found = []
    for call in (step, autoremat.checkpoint(step, budget=1.0), Floor(step)):
        with warnings.catch_warnings():  # such a tensor is not what was recorded
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(2):
                x = Wrapper(inner.clone().requires_grad_())
                call(x).backward()
        found.append(x.grad.inner)
    assert all(torch.equal(g, found[0]) for g in found)


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fn", [smooth, differentiates_inside])
def test_nested(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 8, requires_grad=True)
    for plain, checkpointed in nested_ways(fn, Floor):
        expected = plain(x)
        for _ in range(2):
            got = checkpointed(x)
            assert torch.equal(got, expected)
            assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (plain(x), got)))
        assert_the_graph_dies(checkpointed)


def test_two_children() -> None:
    f, g = smooth, chain
    x = torch.randn(8, 8, requires_grad=True)
    expected = grad(grad(lambda x: g(f(x))))(x)
    inner, outer = Floor(f), Floor(g)
    both = Floor(lambda x: outer(inner(x)))
    for checkpointed in (grad(grad(both)), grad(Floor(grad(both)))):
        for _ in range(2):
            assert torch.equal(checkpointed(x), expected)
        assert_the_graph_dies(checkpointed)


def test_hook_on_the_graph_runs_once() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    step = Floor(chain)
    step(x).sum().backward()
    calls: list[int] = []
    y = step(x)
    for node in all_nodes(y.grad_fn):
        node.register_hook(lambda *_: calls.append(0))
    y.sum().backward()
    assert step.reruns > 0
    assert len(calls) == len(all_nodes(chain(x).grad_fn))


def test_hook_runs_once_for_a_parameter_used_inside_and_outside() -> None:
    calls: list[Tensor] = []
    w, x = torch.randn(8, 8, requires_grad=True), torch.rand(8, 8, requires_grad=True)
    found = []
    for call in (lambda h: w * chain(w * h), Floor(lambda h: w * chain(w * h))):
        call(x)
        handle = w.register_hook(calls.append)
        calls.clear()
        call(w * x).sum().backward()
        handle.remove()
        assert len(calls) == 1
        found.append(calls[0])
    assert torch.equal(*found)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_backward_inside_a_backward(retain: bool, times: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = net(3), net(3), net(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.trunk(x)
            return h, self.a(h), self.b(h)

    def step(call: Any, x: Tensor) -> Any:
        h, p, q = call(x)
        got: list[Any] = []

        @torch.enable_grad()
        def hook(*_: Any) -> None:
            for _ in range(times):
                got.append(torch.autograd.grad(p.square().mean(), call.a.layers[1].weight, retain_graph=True))
                got.append(torch.autograd.grad(h.square().mean(), call.trunk.layers[1].weight, retain_graph=True))

        handles = [q.grad_fn.register_hook(hook), call.b.layers[1].bias.register_hook(hook)]
        (p.mean() + q.square().mean()).backward(retain_graph=retain)
        for handle in handles:
            handle.remove()
        return got

    check_step(step, Two)


def test_backward_in_two_halves() -> None:
    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        y = chain(x)
        return y, chain(y)

    x = torch.randn(8, 8, requires_grad=True)
    checkpointed = Floor(step)
    checkpointed(x)
    found = []
    for call in (step, checkpointed):
        y, z = call(x)
        (at_y,) = torch.autograd.grad(z, (y,), (torch.ones(8, 8),))
        found.append(torch.autograd.grad(y, (x,), (at_y,))[0])
    assert torch.equal(*found)


def test_backward_as_often_as_one_likes() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    step = Floor(chain)
    step(x)
    loss = step(x).sum()
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(5)]
    assert all(torch.equal(g, torch.autograd.grad(chain(x).sum(), x)[0]) for g in grads)
    assert step.reruns > 5


def test_another_computation_at_every_call() -> None:
    """The Python code runs once per step, so it cannot contradict itself; the next step notices and is exact, too."""

    def build() -> World:
        bodies = [chain, lambda x: x.sin().exp(), lambda x: x.sin() * torch.linspace(1, 2, WIDTH), chain, chain]
        turn = {"n": 0}

        def step(x: Tensor) -> Tensor:
            turn["n"] += 1
            return bodies[turn["n"] % 5](chain(x)).mean()

        def whole(call: Any) -> Any:
            x = data().requires_grad_()
            loss = call(x)
            loss.backward()
            return loss, x.grad

        return World(step, whole)

    exact(build, steps=5, deviates=True)
