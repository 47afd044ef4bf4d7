"""What PyTorch's tests ask of ``torch.utils.checkpoint``: saved tensors and memory (see ``test_torch_demands``)."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoremat.engines.torch.eager.tape import Tape
from autoremat.engines.torch.world.memory_account import account
from tests.engines.torch.compare import quick
from tests.engines.torch.eager.attacks.demands import Counts, Floor, chain
from tests.engines.torch.eager.attacks.networks import Saves, check_body

__all__ = ["quick"]  # a fixture

# ---- saved tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
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
