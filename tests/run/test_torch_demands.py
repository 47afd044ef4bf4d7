"""What PyTorch's tests ask of ``torch.utils.checkpoint``, asked of ``autoremat.checkpoint`` in our own words.

The lists are those of ``TestCheckpoint`` in PyTorch's ``test/test_utils.py`` and of the tests named ``*checkpoint*``,
``TestNestedCheckpoint`` and ``TestSelectiveActivationCheckpoint`` in its ``test/test_autograd.py``.

Which of ours answers which of theirs, and which do not apply, is the first table of ``docs/attacks.md``.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autoremat
from autoremat.engines.torch.eager.tape import Tape
from autoremat.engines.torch.world.memory_account import account
from tests.run.compare import World, exact, quick
from tests.run.test_hostile import WIDTH, check_body, data
from tests.run.test_hostile_use import Saves, check_step, net

__all__ = ["quick"]  # a fixture


class Floor:
    """A callable checkpointed at the smallest budget that its first call fits into."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self.fn, self.options, self.budget = fn, options, 1
        self.call = self._wrapped()

    def _wrapped(self) -> Callable[..., Any]:
        def fresh(*args: Any, **kwargs: Any) -> Any:
            return self.fn(*args, **kwargs)

        return autoremat.checkpoint(fresh, budget=self.budget, **self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return self.call(*args, **kwargs)
            except autoremat.InfeasibleBudget as error:
                self.budget = max(self.budget + 1, error.floor_bytes)
                self.call = self._wrapped()

    @property
    def reruns(self) -> int:
        return autoremat.stats(self.call).reruns


def chain(x: Tensor) -> Tensor:
    for _ in range(4):
        x = x.exp().sin() * x.cos()
    return x


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


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


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


# ---- arguments and results -------------------------------------------------------------------------------------------


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


def grad(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def wrapped(x: Tensor) -> Tensor:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        return g

    return wrapped


def smooth(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def differentiates_inside(x: Tensor) -> Tensor:
    a, b = smooth(x), smooth(x)
    torch.autograd.grad(a.sum(), x)
    torch.autograd.grad(b.sum(), x)
    return x.sin().cos().sin()


def nested_ways(f: Callable[[Tensor], Tensor], c: Any) -> Iterator[tuple[Any, Any]]:
    yield f, c(f)
    yield f, c(c(f))
    yield grad(f), grad(c(f))
    yield grad(f), grad(c(c(f)))
    yield grad(grad(f)), grad(c(grad(f)))
    yield grad(grad(f)), c(grad(grad(c(f))))
    yield grad(grad(f)), grad(c(grad(c(f))))
    yield grad(grad(grad(f))), grad(c(grad(grad(c(f)))))
    yield grad(grad(grad(f))), grad(c(grad(c(grad(c(f))))))


def all_nodes(root: Any) -> list[Any]:
    pending, seen = [root], {root}
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
    return list(seen)


class Label:
    pass


def assert_the_graph_dies(fn: Callable[[Tensor], Tensor]) -> None:
    def labels() -> list[weakref.ref[Label]]:
        x = torch.randn(8, 8, requires_grad=True)
        found = []
        for node in all_nodes(fn(x).grad_fn):
            label = Label()
            node.metadata["label"] = label
            found.append(weakref.ref(label))
        return found

    refs = labels()
    gc.collect()
    assert refs
    assert not any(r() for r in refs)


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


# ---- saved tensors ---------------------------------------------------------------------------------------------------


def test_custom_function_reads_its_tensors_twice() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        x = h * h.sin()
        return Saves.apply(x, 0.5) * (x * h).cos()

    check_body(body)


def test_saved_tensors_looked_at() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    step = Floor(lambda x: torch.exp(chain(x)))
    step(x)
    y = step(x)
    for _ in range(2):
        assert torch.equal(y.grad_fn._saved_result, y)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, torch.autograd.grad(torch.exp(chain(x)).sum(), x)[0])
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = y.grad_fn._saved_result


def test_saved_inputs_are_the_same_objects() -> None:
    """As in plain training, and with what their owner has hung on them."""
    seen: list[Tensor] = []

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return x * y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            seen.append(ctx.saved_tensors[0])
            return g * seen[-1] * seen[-1].factor, None

    y = torch.rand(8)
    y.factor = 2.0
    x = torch.randn(8, 8, requires_grad=True)
    step = Floor(lambda x, y: Scale.apply(chain(x), y))
    step(x, y)
    seen.clear()
    step(x, y).sum().backward()
    assert seen[0] is y


def test_dispatch_mode_inside() -> None:
    seen: list[list[str]] = []

    def body(i: int, h: Tensor) -> Tensor:
        with Counts() as counts:
            y = h.exp()
        seen.append(counts.seen)
        return y.sin() * h.cos()

    check_body(body)
    assert all(s[0] == "aten.exp.default" and set(s[1:]) <= {"aten.detach.default"} for s in seen)


def test_kept_value_changed_in_place() -> None:
    """No error: the plan knows which version of the value it keeps."""

    def step(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x.sin().mul_(2).cos().exp()
        return x

    x = torch.randn(64, 64, requires_grad=True)
    kept = Floor(step, keep=("aten.sin*",))
    kept(x)
    (got,) = torch.autograd.grad(kept(x).sum(), x)
    assert torch.equal(got, torch.autograd.grad(step(x).sum(), x)[0])


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_graph_and_values_die_with_the_result() -> None:
    """Without the garbage collector, whether there was a backward pass or not."""
    made: list[weakref.ref[Any]] = []

    def step(x: Tensor) -> Tensor:
        for _ in range(4):
            y = x.exp()
            made.append(weakref.ref(y.untyped_storage()))
            x = y.sin() * x.cos()
        return x

    x = torch.randn(64, 64, requires_grad=True)
    checkpointed = Floor(step)
    for _ in range(2):  # without a gradient, and with one
        checkpointed(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        for retain in (None, False, True):
            made.clear()
            tapes = sum(type(o) is Tape for o in gc.get_objects())
            y = checkpointed(x)
            if retain is not None:
                y.sum().backward(retain_graph=retain)
            del y
            assert len(made) == 4
            assert not any(r() for r in made)
            assert sum(type(o) is Tape for o in gc.get_objects()) == tapes
    finally:
        gc.enable()


def test_memory_is_freed_as_the_backward_proceeds() -> None:
    """Every node that is done lets go of what it saved, or has had computed again, as in plain training."""
    living: list[int] = []

    def step(x: Tensor) -> Tensor:
        for _ in range(6):
            x = x.exp().sin().cos()
            if type(x) is Tensor and x.grad_fn is not None:
                x.register_hook(lambda g: living.append(allocated()))
        return x.sum()

    held: list[weakref.ref[Any]] = []

    def allocated() -> int:
        return sum(s.nbytes() for r in held if (s := r()) is not None)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                held.append(weakref.ref(out.untyped_storage()))
            return out

    x = torch.randn(64, 64, requires_grad=True)
    x.grad = torch.zeros_like(x)
    checkpointed = Floor(step)
    checkpointed(x).backward()
    loss = checkpointed(x)
    living.clear()
    plain = account(lambda: step(x).backward(), 0).peak_bytes
    tight = account(lambda: checkpointed(x).backward(), 0).peak_bytes
    assert tight < 0.6 * plain
    living.clear()
    with Watch():
        loss.backward()
    assert len(living) == 6
    assert max(living) <= 8 * x.nbytes  # a gradient or two, and one stretch of the chain


def test_what_a_custom_function_saves_dies_with_the_step() -> None:
    """Without the garbage collector, although the function saves what it returns."""
    saved: list[weakref.ref[Any]] = []

    class SavesItsResult(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = x.exp()
            ctx.save_for_backward(y)
            saved.append(weakref.ref(y))
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (y,) = ctx.saved_tensors
            return grad * y

    x = torch.randn(64, 64, requires_grad=True)
    x.grad = torch.zeros_like(x)
    step = Floor(lambda x: SavesItsResult.apply(SavesItsResult.apply(x.sin()).sin()).sin())
    step(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        saved.clear()
        before = step.reruns
        step(x).sum().backward()
        assert step.reruns > before
        assert len(saved) == 2
        assert not any(r() is not None for r in saved)
    finally:
        gc.enable()
