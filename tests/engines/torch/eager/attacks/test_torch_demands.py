"""What PyTorch's tests ask of ``torch.utils.checkpoint``, asked of ``autoremat.checkpoint`` in our own words.

The lists are those of ``TestCheckpoint`` in PyTorch's ``test/test_utils.py`` and of the tests named ``*checkpoint*``,
``TestNestedCheckpoint`` and ``TestSelectiveActivationCheckpoint`` in its ``test/test_autograd.py``.

Which of ours answers which of theirs, and which do not apply, is the first table of ``docs/attacks.md``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.demands import Counts, Floor, chain
from tests.engines.torch.eager.attacks.networks import WIDTH, check_step, data

__all__ = ["quick"]  # a fixture

# ---- what runs again -------------------------------------------------------------------------------------------------


def test_ops_run_again_python_does_not() -> None:
    calls = []
    step = Floor(lambda x: calls.append(0) or chain(x))
    x = torch.randn(64, 64, requires_grad=True)
    for _ in range(2):  # one that is recorded, and one that follows the plan
        before = step.reruns
        torch.autograd.grad(step(x).sum(), x)
    each, before = step.reruns - before, step.reruns
    assert each > 0
    calls.clear()
    for k in range(1, 4):
        torch.autograd.grad(step(x).sum(), x)
        assert len(calls) == k
        assert step.reruns == before + each * k


def test_nothing_runs_again_that_nobody_needs() -> None:
    """The clone at the end saves nothing, so the backward never asks for it; a step that saves nothing runs once."""
    x = torch.randn(64, 64, requires_grad=True)
    step = Floor(lambda x: chain(x).clone())
    step(x).sum().backward()
    loss = step(x).sum()
    with Counts() as counts:
        loss.backward()
    assert "aten.clone.default" not in counts.seen
    assert "aten.exp.default" in counts.seen
    saves_nothing = Floor(lambda x: (x + 1).clone() - 2)
    saves_nothing(x).sum().backward()
    saves_nothing(x).sum().backward()
    assert saves_nothing.reruns == 0


def test_kept_operators_do_not_run_again() -> None:
    def step(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            var, mean = torch.var_mean((x.cos() @ w).sin(), 1, keepdim=True)
            x = (x * var).exp().sin() + mean
        return x.sum()

    x, w = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    plain = torch.autograd.grad(step(x, w), (x, w))
    kept = Floor(step, keep=("aten.mm*", "aten.var_mean*"))
    kept(x, w)
    loss = kept(x, w)
    with Counts() as counts:
        got = torch.autograd.grad(loss, (x, w))
    assert kept.reruns > 0
    assert "aten.var_mean.correction" not in counts.seen
    assert counts.seen.count("aten.mm.default") == 6  # two for each of the forward's
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_custom_operator_runs_again_once_it_has_been_seen_to_give_the_same() -> None:
    calls: list[int] = []
    with torch.library._scoped_library("autoremat_demands", "FRAGMENT"):

        @torch.library.custom_op("autoremat_demands::sin_and_two", mutates_args=())
        def sin_and_two(x: Tensor) -> tuple[Tensor, int]:
            calls.append(0)
            return x.sin(), 2

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * x.cos()

        torch.library.register_autograd("autoremat_demands::sin_and_two", backward, setup_context=setup_context)

        def step(x: Tensor) -> Tensor:
            for _ in range(3):
                y, two = torch.ops.autoremat_demands.sin_and_two(x)
                x = (y * x.exp().sin() * two).sin()
            return x.sum()

        x = torch.randn(64, 64, requires_grad=True)
        (plain,) = torch.autograd.grad(step(x), x)
        checkpointed = Floor(step)
        checkpointed(x)
        calls.clear()
        before = checkpointed.reruns
        (got,) = torch.autograd.grad(checkpointed(x), x)
        assert len(calls) > 3
        assert checkpointed.reruns > before
        assert torch.equal(got, plain)


# ---- the same numbers ------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.SiLU()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", ["sequential", "module list", "list", "data parallel"])
def test_sequential_and_module_list(kind: str) -> None:
    def build() -> World:
        layers = Layers()
        model: Any = layers
        if kind == "sequential":
            model = nn.Sequential(*layers.layers)
        elif kind == "data parallel":
            model = nn.DataParallel(layers)
        elif kind == "list":
            listed = list(layers.layers)

            def model(x: Tensor) -> Tensor:
                for layer in listed:
                    x = layer(x)
                return x

        x = data()

        def step(call: Any) -> Any:
            layers.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.sum().backward()
            return y, leaf.grad

        return World(model, step, (layers,))

    exact(build)


def test_backward_and_grad_agree() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    chain(x).sum().backward()
    plain, x.grad = x.grad, None
    step = Floor(chain)
    step(x)
    step(x).sum().backward()
    (grad,) = torch.autograd.grad(step(x).sum(), (x,))
    assert step.reruns > 0
    assert torch.equal(x.grad, plain)
    assert torch.equal(grad, plain)


def test_gradient_of_a_gradient() -> None:
    def step(call: Any, x: Tensor) -> Any:
        x = x.clone().requires_grad_()
        y = call(x)
        weights = torch.linspace(0, 1, WIDTH)
        (g,) = torch.autograd.grad([y], [x], [weights.expand_as(y)], create_graph=True)
        (h,) = torch.autograd.grad(g.sin().sum(), x)
        return y, g, h

    check_step(step)


def test_error_and_then_a_good_call() -> None:
    """torch.utils.checkpoint must not stay in the state of an error; here there is no such error to begin with."""
    x = torch.randn(64, 64, requires_grad=True)
    step = Floor(chain)
    step(x)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torch.autograd.grad(step(x), (x,), torch.ones(3))
    (got,) = torch.autograd.grad(step(x).sum(), (x,))
    assert torch.equal(got, torch.autograd.grad(chain(x).sum(), (x,))[0])


def test_wrong_arguments_are_the_callables_error() -> None:
    model = autoremat.checkpoint(Layers(), budget=0.9)
    with pytest.raises(TypeError, match="positional argument"):
        model()
    with pytest.raises(TypeError, match="positional arguments"):
        model(data(), data())
    model(data()).sum().backward()
    assert autoremat.stats(model).plan is not None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_numbers_before_and_inside(device: str) -> None:
    outside, inside = nn.Dropout(), nn.Dropout()

    def step(x: Tensor) -> Tensor:
        return (inside(x.exp()).sin() * x.cos()).exp()

    checkpointed, x = Floor(step), torch.randn(20000, device=device, requires_grad=True)
    checkpointed(outside(x))
    for seed in range(5):
        found = []
        for call in (step, checkpointed):
            torch.manual_seed(seed)
            (g,) = torch.autograd.grad(call(outside(x)).sum(), x)
            found.append((g, torch.rand(1, device=device)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert checkpointed.reruns > 0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast(enabled: bool, device: str) -> None:
    seen = []

    def step(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            y = x @ w
            seen.append(y.dtype)
            x = torch.tanh(y).exp() @ w
        return x.float().mean()

    x, w = (torch.randn(64, 64, device=device).div_(8).requires_grad_() for _ in range(2))
    found = []
    for call in (step, Floor(step)):
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                loss = call(x, w)
        found.append(torch.autograd.grad(loss, (x, w)))  # outside, as it should be
    assert set(seen) == {torch.bfloat16 if enabled else torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_settings_in_the_backward() -> None:
    """Tensors without a device or a dtype of their own are made as in the forward."""

    def step(x: Tensor) -> Tensor:
        for _ in range(3):
            x = (x * torch.rand(64)).exp().sin() * torch.arange(0.0, 6.4, 0.1)
        return x.sum()

    found = []
    for call in (step, Floor(step)):
        torch.manual_seed(0)
        x = torch.randn(64, 64, requires_grad=True)
        call(x)
        torch.manual_seed(1)
        loss = call(x)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.one_in(2, guard=True)
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_many_calls_and_one_backward(input_requires_grad: bool) -> None:
    def build() -> World:
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh(), nn.SiLU())])

        def step(call: Any) -> Any:
            model.zero_grad()
            inputs = [torch.rand(64, 8, requires_grad=input_requires_grad) for _ in range(100)]
            mean = torch.stack([call(x) for x in inputs]).mean()
            mean.backward()
            return mean, [x.grad for x in inputs]

        return World(model, step)

    exact(build, waits=True)
