"""Training on a device is plain training to the last bit: losses, gradients, buffers, generators of host and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig
from tests.engines.torch.compare import World, exact, quick
from tests.gpu.common import EVERY_DEVICE, deterministic, generators, skip_unless_plain_repeats, world

__all__ = ["quick"]  # a fixture


@pytest.fixture(autouse=True)
def _in_a_fixed_order() -> Iterator[None]:
    with deterministic():
        yield


def next_token(logits: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.float().flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long).to(logits.device)
    )


def first_class(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores.float(), torch.zeros(len(scores), dtype=torch.long, device=scores.device))


def gpt(device: str, dropout: float = 0.2, **within: Any) -> World:
    model = GPT(GPTConfig(blocks=2, width=32, heads=2, context=32, dropout=dropout))
    return world(model, (torch.randint(0, 256, (4, 32)),), next_token, device, **within)


def conv_net(device: str, form: torch.memory_format = torch.contiguous_format, **within: Any) -> World:
    model = ResNet(ResNetConfig(widths=(8, 16), blocks_per_stage=1)).to(memory_format=form)
    images = torch.randn(8, 1, 16, 16).to(memory_format=form)
    return world(model, (images,), first_class, device, **within)


def autocast(device: str, dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast(device, dtype)


# ---- networks --------------------------------------------------------------------------------------------------------


@EVERY_DEVICE
def test_gpt_with_dropout(device: str) -> None:
    exact(lambda: gpt(device))


@EVERY_DEVICE
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_batch_norm_dropout_and_in_place_activations(device: str, form: torch.memory_format) -> None:
    exact(lambda: conv_net(device, form))


@EVERY_DEVICE
def test_an_unrolled_recurrent_net(device: str) -> None:
    """cuDNN's, on CUDA: it has a workspace that the backward reads, and a dropout state of its own."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.rnn, self.head = nn.Linear(8, 16), nn.GRU(16, 16, 2, dropout=0.2), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(torch.tanh(self.rnn(torch.tanh(self.inside(x)))[0])))

    def build() -> World:
        return world(Recurrent(), (torch.randn(12, 4, 8),), lambda y: y.square().mean(), device)

    skip_unless_plain_repeats(build)
    exact(build, reruns=False)


@EVERY_DEVICE
def test_numbers_from_a_generator_of_ones_own(device: str) -> None:
    def build() -> World:
        generator = torch.Generator(device=device).manual_seed(3)

        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    noise = torch.empty_like(x).uniform_(0.5, 1.5, generator=generator)
                    x = torch.tanh(layer(x) * noise + torch.rand(x.shape, generator=generator, device=x.device)).exp()
                return x

        made = world(Noisy(), (torch.randn(64, 16),), lambda y: y.square().mean(), device)
        made.extra = lambda: [*generators(device), generator]
        return made

    exact(build)


# ---- lower precision -------------------------------------------------------------------------------------------------


@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_forward(device: str, dtype: torch.dtype) -> None:
    exact(lambda: gpt(device, forward=autocast(device, dtype)))


@EVERY_DEVICE
def test_autocast_of_convolutions(device: str) -> None:
    exact(lambda: conv_net(device, torch.channels_last, forward=autocast(device, torch.bfloat16)))


@EVERY_DEVICE
@pytest.mark.parametrize("init_scale", [8.0, 2.0**40], ids=["finite", "first steps overflow"])
def test_a_gradient_scaler(device: str, init_scale: float) -> None:
    def build() -> World:
        made = gpt(device, 0.1)
        scaler = torch.amp.GradScaler(device, init_scale=init_scale)
        optimizer = torch.optim.SGD(made.target.parameters(), 0.01)
        tokens = torch.randint(0, 256, (4, 32), device=device)

        def step(call: Any) -> tuple[Tensor, float]:
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                value = next_token(call(tokens))
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            scale = scaler.get_scale()
            for (
                p
            ) in made.target.parameters():  # of a step that overflows: where it did, that is all there is to compare
                p.grad = p.grad.nan_to_num(1.0, 2.0, 3.0)
            return value, scale

        made.step = step
        return made

    exact(build, steps=3)


@EVERY_DEVICE
def test_two_forwards_in_one_autocast_region_share_their_casts(device: str) -> None:
    def build() -> World:
        made = gpt(device, 0.0)
        tokens = torch.randint(0, 256, (2, 4, 32), device=device)

        def step(call: Any) -> Tensor:
            made.target.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                value = next_token(call(tokens[0])) + next_token(call(tokens[1]))
            value.backward()
            return value

        made.step = step
        return made

    exact(build, steps=3, deviates=True)  # the second forward finds the casts of the first, which its plan has not


# ---- kernels to choose from ------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention between linear maps, a few times."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.Linear(128, 3 * 128) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (2, 64)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
            x = torch.tanh(x + y.transpose(1, 2).flatten(2)).exp()
        return x


@EVERY_DEVICE
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
def test_kernels_of_attention(device: str, backend: str, dropout: float) -> None:
    if device == "cpu" and (backend not in ("MATH", "FLASH_ATTENTION") or (dropout and backend != "MATH")):
        pytest.skip("not on the CPU")

    def build() -> World:
        return world(
            Attention(dropout).to(torch.bfloat16), (torch.randn(2, 64, 128).to(torch.bfloat16),),
            lambda y: y.float().square().mean(), device, lambda: sdpa_kernel(getattr(SDPBackend, backend)),
        )  # fmt: skip

    with deterministic(strict=backend != "CUDNN_ATTENTION"):
        skip_unless_plain_repeats(build)
        exact(build)


@EVERY_DEVICE
@pytest.mark.parametrize("build", [gpt, conv_net], ids=["GPT", "ResNet"])
def test_cudnn_may_look_for_the_fastest_algorithm(
    device: str, build: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    skip_unless_plain_repeats(lambda: build(device))
    exact(lambda: build(device))


@EVERY_DEVICE
@pytest.mark.parametrize("build", [gpt, conv_net], ids=["GPT", "ResNet"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_of_the_forward_counts(device: str, build: Callable[..., World], precision: str) -> None:
    """What runs again has the precision of the forward, even if the backward has another."""

    class At:
        def __init__(self, value: str) -> None:
            self.value = value

        def __enter__(self) -> None:
            self.before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(self.value)

        def __exit__(self, *_: object) -> None:
            torch.set_float32_matmul_precision(self.before)

    exact(lambda: build(device, forward=lambda: At(precision), backward=lambda: At("highest")))


@EVERY_DEVICE
@pytest.mark.parametrize("inner", [torch.nn.attention.sdpa_kernel, None], ids=["switched", "left"])
def test_a_backend_that_is_chosen_inside_the_forward(device: str, inner: Any) -> None:
    class Chosen(Attention):
        def forward(self, x: Tensor) -> Tensor:
            with inner(SDPBackend.MATH) if inner else nullcontext():
                return super().forward(x)

    def build() -> World:
        return world(Chosen(0.0), (torch.randn(2, 64, 128),), lambda y: y.square().mean(), device)

    skip_unless_plain_repeats(build)
    exact(build)


# ---- where tensors are made ------------------------------------------------------------------------------------------


class MakesTensors(nn.Module):
    """Makes tensors without naming a device."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x) * torch.rand(32) + torch.arange(32.0) / 32).exp()
        return x


@EVERY_DEVICE
@pytest.mark.parametrize("backward", ["same", "none", "meta"])
def test_a_default_device_of_the_forward(device: str, backward: str) -> None:
    other = {"same": device, "none": None, "meta": "meta"}[backward]

    def build() -> World:
        return world(
            MakesTensors(), (torch.randn(64, 32),), lambda y: y.square().mean(), device,
            lambda: torch.device(device), lambda: torch.device(other) if other else nullcontext(),
        )  # fmt: skip

    exact(build)


# ---- only where there is a device ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_step_on_a_stream_of_its_own() -> None:
    def build() -> World:
        made, stream = gpt("cuda"), torch.cuda.Stream()
        inner = made.step

        def step(call: Any) -> Any:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                out = inner(call)
            torch.cuda.current_stream().wait_stream(stream)
            return out

        made.step = step
        return made

    exact(build)


@pytest.mark.gpu
def test_a_side_stream_inside_the_forward() -> None:
    """Half of every layer on another stream, joined at its end as the docs of torch ask for."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.ModuleList(nn.Linear(256, 256) for _ in range(4)) for _ in range(2))
            self.stream: Any = None

        def forward(self, x: Tensor) -> Tensor:
            side = torch.cuda.Stream()
            for left, right in zip(self.left, self.right, strict=True):
                now = torch.cuda.current_stream()
                side.wait_stream(now)
                with torch.cuda.stream(side):
                    other = torch.tanh(right(x)).exp()
                x.record_stream(side)
                x = torch.tanh(left(x)).exp()
                now.wait_stream(side)
                other.record_stream(now)
                x = torch.tanh(x + other)
            return x

    def build() -> World:
        return world(Sides(), (torch.randn(4096, 256),), lambda y: y.square().mean(), "cuda")

    skip_unless_plain_repeats(build)
    exact(build, reruns=False, unplanned=False)


@pytest.mark.gpu
def test_pinned_inputs_are_copied_inside_the_callable() -> None:
    """From a closure, where nobody sees them: as an argument, a tensor of the host beside the device's is refused."""
    pinned = torch.randn(256, 32).pin_memory()

    def build() -> World:
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1))]).cuda()

        def loss() -> Tensor:
            return model(pinned.to("cuda", non_blocking=True)).square().mean()

        def step(call: Any) -> Tensor:
            model.zero_grad()
            value = call()
            value.backward()
            return value

        return World(loss, step, (model,), lambda: generators("cuda"))

    exact(build)
