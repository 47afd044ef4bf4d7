"""Attacks from outside torch: global switches, and memory that torch does not know of."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import (
    ROWS,
    WIDTH,
    Net,
    check_body,
    check_step,
    net,
)

__all__ = ["quick"]  # a fixture

# ---- global switches that change between forward and backward --------------------------------------------------------


def during(read: Callable[[], Any], write: Callable[[Any], object], value: Any, forward: bool) -> Callable[..., Any]:
    """A step with a switch set for the forward only, or for the backward only."""

    def step(call: Any, x: Tensor) -> Tensor:
        before = read()
        write(value if forward else before)
        try:
            loss = call(x).square().mean()
            write(before if forward else value)
            loss.backward()
            assert read() == (before if forward else value)
        finally:
            write(before)
        return loss

    return step


def deciding(i: int, h: Tensor) -> Tensor:
    """Operators that look at every one of the switches."""
    noise = torch.rand(WIDTH) + torch.full((WIDTH,), 3) / 2 + torch.arange(0.0, 1.6, 0.1)
    tiny = (h.detach() * 1e-40) * 1e38
    kernel = torch.linspace(-1, 1, 4 * 4 * 9, dtype=h.dtype).view(4, 4, 3, 3)
    convolved = F.conv2d(h.view(1, 4, ROWS // 4, WIDTH), kernel, padding=1).view(ROWS, WIDTH)
    return (h * noise.to(h.dtype) + tiny + convolved).sin().exp() * (h @ h.t()).sum(1, keepdim=True).cos()


def flushes_denormals() -> bool:
    return (torch.tensor(1e-40) * 1).item() == 0


SWITCHES = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "denormals": (flushes_denormals, torch.set_flush_denormal, True),
    "mkldnn": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
}


@pytest.mark.one_in(5, guard=True)
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switch_thrown_between_forward_and_backward(switch: str, forward: bool) -> None:
    check_step(during(*SWITCHES[switch], forward=forward), lambda: Net(deciding, 3))


def test_other_number_of_threads_in_the_backward() -> None:
    """A sum over many numbers is split by threads."""

    def build() -> World:
        layers, x = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), torch.randn(2048, 64)

        def loss(x: Tensor) -> Tensor:
            for layer in layers:
                h = torch.tanh(layer(x))
                x = x + (h * h.mean()).exp().sin() * (h.sum() * 1e-3).cos()
            return x.square().mean()

        def step(call: Any) -> Tensor:
            layers.zero_grad()
            torch.set_num_threads(4)
            out = call(x)
            torch.set_num_threads(1)
            out.backward()
            return out

        return World(loss, step, (layers,))

    exact(build)


@pytest.mark.parametrize("forward", [True, False])
def test_new_precision_switches(forward: bool) -> None:
    """Once one of them is set, torch refuses to read the older ones."""
    matmul = torch.backends.mkldnn.matmul
    step = during(lambda: matmul.fp32_precision, lambda v: setattr(matmul, "fp32_precision", v), "bf16", forward)
    check_step(step)
    torch.get_float32_matmul_precision()  # is readable again


def test_backward_in_inference_mode() -> None:
    def step(call: Any, x: Tensor) -> Tensor:
        loss = call(x).square().mean()
        with torch.inference_mode():
            loss.backward()
        return loss

    check_step(step)


# ---- memory that torch does not know of ------------------------------------------------------------------------------


def test_memory_shared_through_dlpack_or_numpy() -> None:
    """Two storages on one memory: what is written through one changes the other."""

    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        other = torch.from_dlpack(y) if i % 2 else torch.from_numpy(y.numpy())
        a = other.sin()
        y.mul_(2)
        return (h * a.exp()).sin() + y.cos() * h.exp()

    check_body(body)


def test_activation_changed_by_numpy_after_it_was_read() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        b = (y + 1).exp()
        y.numpy()[:] *= 0.5
        return (h * b).sin() * b.cos() * h + y.cos()

    check_body(body)


def test_inputs_on_the_memory_of_one_array() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.net(x.clone())
            c = y.sin()
            x.mul_(0.5)
            return (self.net(x + h) * c.exp()).sin() * h.exp()

    def build() -> World:
        model, array = Writes(), np.random.rand(ROWS, WIDTH).astype(np.float32)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            loss = call(torch.from_numpy(array), torch.from_numpy(array)).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build)


def test_written_through_data_ptr() -> None:
    """Compiled code gets real addresses while the step is recorded, never the null pointer of a fake tensor."""

    def body(i: int, h: Tensor) -> Tensor:
        y, filled, source = h.detach() * 2, torch.empty_like(h), h.detach() * 3
        ctypes.memset(y.data_ptr(), 0, y.nbytes // 2)
        ctypes.memmove(filled.data_ptr(), source.data_ptr(), filled.nbytes)
        return (h * y.exp().sin()).sin() * y.cos() * filled.sin().exp()

    check_body(body)


def test_written_through_data_ptr_unless_the_tensor_is_fake() -> None:
    """As kernels with a fake version do it."""

    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        if type(y) is Tensor:
            ctypes.memset(y.data_ptr(), 0, y.nbytes // 2)
        return (h * y.exp().sin()).sin() * y.cos()

    check_body(body)  # that it is about to be written is seen: it asks for the address


def test_custom_operator_that_hides_what_it_writes() -> None:
    with torch.library._scoped_library("autoremat_lies", "FRAGMENT") as library:
        library.define("triple(Tensor x) -> Tensor")
        library.impl("triple", lambda x: x.mul_(3).sum(), "CompositeExplicitAutograd")

        def body(i: int, h: Tensor) -> Tensor:
            y = h.detach() * 2
            torch.ops.autoremat_lies.triple(y)
            return (h * y.exp().sin()).sin() * y.cos()

        check_body(body, differs=True)


def test_another_thread_writes_into_an_activation() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.detach() * 2
        thread = threading.Thread(target=lambda: y.mul_(3))
        thread.start()
        thread.join()
        return (h * y.exp().sin()).sin() * y.cos()

    check_body(body, differs=True)


@pytest.mark.filterwarnings("ignore:autoremat")
def test_result_changed_by_numpy_after_the_forward() -> None:
    """Autograd has not saved it, so plain training does not mind; a rerun would read it.

    The first step that follows its plan finds out in its backward, too late to go on; then it is exact.
    """

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Any:
            features = []
            for layer in self.layers:
                features.append(layer(x) + 1)
                x = x + (features[-1] + 1).exp().sin()
            return x, features

    def step(call: Any, x: Tensor) -> Tensor:
        y, features = call(x)
        for f in features:
            f.detach().numpy()[:] = 0.5
        y.square().mean().backward()
        return y

    torch.manual_seed(0)
    plain, x = Features(), torch.randn(ROWS, WIDTH)
    model = autoremat.checkpoint(copy.deepcopy(plain), budget=1.0, recompute=("aten.exp*", "aten.add*"))
    refusals = 0
    done = {plain: 0, model: 0}
    for m in (plain, model):
        while done[m] < 3:
            m.zero_grad()
            try:
                step(m, x)
                done[m] += 1
            except RuntimeError as error:  # one operator is found at a time
                refusals += "set the gradients to None and repeat the step" in str(error)
                assert refusals == autoremat.stats(model).differing
    assert refusals > 0
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("between", [True, False])
def test_data_of_weights_swapped_in_the_forward(between: bool) -> None:
    """As binary networks do: autograd's backward sees the data that the weight has by then."""

    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(4))
            self.full: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.full = []
            for layer in self.layers:
                full = layer.weight.data
                self.full.append(full)
                layer.weight.data = full.sign() * full.abs().mean()
                x = x + layer(x).exp().sin()
                if not between:
                    layer.weight.data = full
            return x

    def build() -> World:
        model, x = Binary(), torch.randn(8, 4, 64)

        def step(call: Any) -> Tensor:
            model.zero_grad()
            loss = call(x).square().mean()
            for layer, full in zip(model.layers, model.full, strict=True):
                layer.weight.data = full
            loss.backward()
            return loss

        return World(model, step)

    exact(build)
