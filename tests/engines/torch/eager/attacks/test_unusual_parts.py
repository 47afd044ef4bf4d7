"""Attacks with unusual parts inside the model: strides, quantization, vmap, attention backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint_sequential

from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, Net, check_body, check_step, curly, net, training

__all__ = ["quick"]  # a fixture


def test_as_strided_and_in_place_on_it() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y.as_strided((ROWS - 1, WIDTH), (WIDTH, 1), WIDTH).mul_(0.5)
        columns = y.as_strided((WIDTH, ROWS // 2), (1, 2 * WIDTH), 0)
        overlapping = y.as_strided((ROWS, 4, 8), (WIDTH, 2, 1))
        return y.sin() + columns.t().repeat(2, 1).cos() * h + overlapping.sum(1).repeat(1, 2).tanh()

    check_body(body)


@pytest.mark.parametrize("through_data", [True, False])
def test_weights_changed_in_place_in_the_forward(through_data: bool) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if through_data:
                    layer.weight.data.clamp_(-0.2, 0.2)
                else:
                    with torch.no_grad():
                        layer.weight.clamp_(-0.2, 0.2).div_(layer.weight.norm())
                x = x + layer(x).exp().sin()
            return x

    exact(lambda: training(Clamped()), steps=3)


def test_parametrization_of_ones_own() -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return (w.triu() + w.triu(1).t()).tanh()

    def build() -> World:
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
        for layer in model[::2]:
            nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())
        return training(model)

    exact(build)


def test_synchronised_batch_norm_and_collectives_of_one_process() -> None:
    """On CPU torch has synchronised batch norm only outside a process group; there it is batch norm."""

    def build() -> World:
        return training(
            nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.SyncBatchNorm(16), nn.Tanh())])
        )

    exact(build, steps=3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:

        def body(i: int, h: Tensor) -> Tensor:
            y, z = h.detach().exp(), (h * 2).detach()
            dist.all_reduce(y)
            dist.all_reduce(z, async_op=True).wait()
            return y.sin() * h.exp().sin() * z.cos() * h.cos()

        check_body(body)
    finally:
        dist.destroy_process_group()


def test_attention_fused_and_unfused() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        q, k, v = ((h * scale).view(2, 2, 64, 16) for scale in (1.0, 0.5, 0.25))
        fused = i % 2
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0 if fused else 0.2, is_causal=True)
        return out.reshape(ROWS, WIDTH)

    check_body(body)


def test_quantization_aware_training() -> None:
    """The observers' first step takes another path than the later ones."""

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.one = nn.ModuleList(
                FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255) for _ in range(4)
            )
            self.two = nn.ModuleList(FusedMovingAvgObsFakeQuantize() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer, one, two in zip(self.layers, self.one, self.two, strict=True):
                h = torch.tanh(layer(x))
                x = x + two(one(h.exp()).sin()) * h.cos()
            return x

    exact(lambda: training(Quantized()), steps=3, deviates=True)


def test_vmapped_parts_with_random_numbers_and_weights() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = torch.vmap(lambda w, x: (x @ w).exp().sin() * x.cos(), in_dims=(0, None))(self.weights, x).mean(0)
                x = torch.vmap(lambda r: F.dropout(r, 0.3), randomness="different")(x)
                x = x + torch.vmap(lambda r: r.view(4, 4) @ r.view(4, 4).t())(x).reshape(ROWS, WIDTH).cos()
            return x

    exact(lambda: training(Ensemble()), reruns=False)  # what vmap computes stays out of sight


def test_checkpoint_sequential_inside() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))]
            self.first, self.second = nn.Sequential(*layers), net(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint_sequential(self.first, 2, x, use_reentrant=False))

    exact(lambda: training(Mixed()), steps=3)


def test_several_generators_in_turn() -> None:
    def build() -> World:
        generators = [torch.Generator().manual_seed(k) for k in range(3)]

        def body(i: int, h: Tensor) -> Tensor:
            a = torch.rand(ROWS, 1, generator=generators[i % 3])
            b = torch.bernoulli(h.sigmoid().detach(), generator=generators[(i + 1) % 3])
            order = torch.randperm(ROWS, generator=generators[0])
            return (h * a + b * h.exp()).sin()[order] * F.dropout(h, 0.2)

        world = training(Net(body))
        world.extra = lambda: generators
        return world

    exact(build, steps=3)


def test_mixed_dtypes() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        wide, narrow, mask = h.double().exp(), h.exp().bfloat16().sin(), h > 0
        bytes_, shorts = ((h + 2) * 3).to(torch.uint8), (h * 5).round().to(torch.int16)
        y = torch.where(mask, narrow.float(), wide.float()) * bytes_.float().sin()
        y = y + shorts.double().cos().float() * h.half().exp().float()
        return (y + torch.complex(h, y).abs()).sin() * (h * mask)

    check_body(body)


def test_subclass_that_only_wraps_functions() -> None:
    class Mine(Tensor):
        pass

    def body(i: int, h: Tensor) -> Tensor:
        h = h.as_subclass(Mine)
        return (h.exp().sin() * h.cos()).as_subclass(Tensor)

    check_body(body)


def test_gradients_of_activations_kept() -> None:
    def build() -> World:
        kept: list[Tensor] = []

        def body(i: int, h: Tensor) -> Tensor:
            h = h * 1
            h.retain_grad()
            kept.append(h)
            return curly(i, h)

        world = training(Net(body))
        plain = world.step

        def step(call: Any) -> Any:
            loss = plain(call)
            found = [h.grad for h in kept]
            assert len(found) == 5
            kept.clear()
            return loss, found

        world.step = step
        return world

    exact(build)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_scripted_function_inside() -> None:
    """Its executor changes the operators after a few runs."""

    @torch.jit.script
    def scripted(h: Tensor, scale: float) -> Tensor:
        if scale > 1:
            return h.exp().sin() * h.cos()
        return (h * scale).exp().sin() * h.cos() + torch.dropout(h, 0.3, True)

    check_body(lambda i, h: scripted(h, 0.5 + i), steps=5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
def test_dual_numbers() -> None:
    """Forward mode around the call, and inside."""

    def step(call: Any, x: Tensor) -> Any:
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.sin())))
            (y.square().mean() + tangent.square().mean()).backward()
        return y, tangent

    check_step(step, reruns=False, unplanned=True)

    def body(i: int, h: Tensor) -> Tensor:
        with forward_ad.dual_level():
            y, tangent = forward_ad.unpack_dual(forward_ad.make_dual(h, h.detach().sin()).exp().sin())
        return y * h + tangent

    check_body(body)
