"""Attacks on in-place operators, views, buffers, random numbers, autocast and layers: all as in plain training."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.operators import timing
from tests.run.compare import World, exact, quick

__all__ = ["quick"]  # a fixture
ROWS, WIDTH = 256, 16


class Net(nn.Module):
    """A stack of layers with ``body(layer number, h)`` after each linear map."""

    def __init__(self, body: Callable[[int, Tensor], Tensor], depth: int = 5, **modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.body = body
        self.more = nn.ModuleDict(modules)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.body(i, torch.tanh(layer(x)))
        return x


def data() -> Tensor:
    return torch.randn(ROWS, WIDTH)


def training(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] = lambda y: (y * y).mean()) -> World:
    """Steps that change the input and the parameters."""
    inputs = inputs or (data(),)

    def step(call: Any) -> Tensor:
        model.zero_grad()
        out = loss(call(*inputs))
        out.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None and p.grad.layout is torch.strided:
                    p -= 0.01 * p.grad
        return out

    return World(model, step)


def check_body(body: Callable[[int, Tensor], Tensor], **options: Any) -> None:
    exact(lambda: training(Net(body)), **options)


# ---- in-place and views ----------------------------------------------------------------------------------------------


def test_in_place_chain_on_one_tensor() -> None:
    check_body(lambda i, h: h.sin().add_(1).mul_(2).sub_(h).relu_())


def test_in_place_chain_on_a_view() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y[:, : WIDTH // 2].add_(3).mul_(0.5)
        y[:, WIDTH // 2 :].sub_(1).mul_(h[:, : WIDTH // 2]).abs_()
        return y.sin()

    check_body(body)


def test_views_of_views_then_in_place() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        v = y.view(ROWS, 2, WIDTH // 2).transpose(1, 2)[1:, :, 0]
        v.mul_(3).add_(h.view(ROWS, 2, WIDTH // 2)[1:, 1])
        w = y.t()[2:5].unsqueeze(0).squeeze(0)
        w.tanh_()
        return y.cos()

    check_body(body)


def test_in_place_on_the_base_is_seen_through_an_old_view() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 3
        view = y[:, ::2]
        y.add_(h)
        return torch.cat([view.sin(), y[:, 1::2].cos()], 1)

    check_body(body)


def test_expand_and_in_place_on_what_was_expanded() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        row = h.mean(0, keepdim=True)
        wide = row.expand(ROWS, WIDTH)
        y = (wide * h).sin()
        row.add_(1)
        return y + row.expand(ROWS, WIDTH).tanh().detach() * h

    def body_safe(i: int, h: Tensor) -> Tensor:
        row = h.mean(0, keepdim=True)
        y = row.expand(ROWS, WIDTH) + h.sin()
        row.add_(1).mul_(2)
        return y.tanh() * row.expand_as(h)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        check_body(body)
    check_body(body_safe)


def test_slice_assignment() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        y[:, :8] = h[:, 8:].exp()
        y[::2, 8:] = h[::2, :8].sin()
        y[1::2, 8:] = 0.5
        return y.tanh() * h

    check_body(body)


def test_slice_assignment_into_uninitialised_memory() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = torch.empty(ROWS, 2 * WIDTH)
        y[:, :WIDTH] = h.exp()
        y[:, WIDTH:] = h.sin()
        return (y.tanh() * y)[:, 8:24]

    check_body(body)


def test_copy_between_views_of_one_storage() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y[:, :4].copy_(y[:, 4:8])
        y[:, 12:].copy_(y[:, :4])
        return y.sin() * h

    check_body(body)


def test_index_put_and_scatter() -> None:
    index = torch.arange(ROWS).flip(0)[: ROWS // 2]

    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y[index] = h[: ROWS // 2].sin()
        y.index_put_((index,), h[ROWS // 2 :], accumulate=True)
        y.scatter_(1, torch.zeros(ROWS, 1, dtype=torch.long), h[:, :1].cos())
        y.scatter_add_(1, torch.ones(ROWS, 2, dtype=torch.long), h[:, :2])
        y.index_add_(0, index, h[: ROWS // 2])
        y.masked_fill_(h > 0.7, 0.25)
        return y.tanh() * h

    check_body(body)


def test_out_arguments() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = torch.empty(WIDTH)
            torch.mean(h, 0, out=scale)
            big = torch.zeros(ROWS, WIDTH)
            torch.exp(h, out=big)
            torch.add(big, 1, out=big)
        return (h * scale).sin() * big

    check_body(body)


def test_operators_that_return_several_tensors_one_of_them_modified() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        values, order = h.sort(1)
        values = values * 2
        a, b = values.chunk(2, 1)
        top, at = torch.topk(h, 4, 1)
        a = a.clone().add_(top.sum(1, keepdim=True))
        return torch.cat([a, b], 1).gather(1, order).tanh() + at.float().mean()

    check_body(body)


def test_unsafe_views_and_reshapes() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.t().reshape(-1).reshape(WIDTH, ROWS).t().contiguous()
        z = F.fold(F.unfold(y.view(1, 1, ROWS, WIDTH), (2, 2), stride=2), (ROWS, WIDTH), (2, 2), stride=2)
        return torch.flip(z.view(ROWS, WIDTH).sin(), (1,)).roll(3, 0)

    check_body(body)


def test_strided_and_complex_values() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        z = torch.fft.fft(h, dim=1)
        w = (z.conj() * (0.1 * z).sin().conj()).resolve_conj() + z.imag.cos() * 1j
        w.imag.mul_(0.5)
        return torch.fft.ifft(w, dim=1).real.tanh() + torch.view_as_real(z).sum(-1).sin() + z.conj().imag.sin()

    check_body(body)


def test_resize_and_set_do_no_harm() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        scratch = torch.empty(0)
        with torch.no_grad():
            scratch.resize_(ROWS, WIDTH).copy_(h).mul_(2)
            other = torch.empty(0).set_(scratch)
            other.add_(1)
        return (h * scratch).sin() * h

    check_body(body)


def test_activation_changed_through_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.exp()
        y.data.mul_(0.5)
        z = y.sin()
        return z * h

    check_body(body)


def test_saved_activation_changed_through_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h.exp()
        z = y.sin()
        y.data.mul_(0.5)
        return z * h

    check_body(body)


def test_activation_given_other_data() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        y = h * 2
        y.data = h.detach().cos()
        return y.sin() * h

    check_body(body)


# ---- buffers, parametrizations, tying --------------------------------------------------------------------------------


class Counted(nn.Module):
    """Keeps a running mean in a buffer, written in place, and reads it before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean).tanh()
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.linear(x - self.mean.clone()).sin() + x


def test_buffer_written_in_place_between_two_reads() -> None:
    exact(lambda: training(nn.Sequential(*[Counted() for _ in range(4)])), steps=3)


def test_buffer_replaced_in_forward() -> None:
    class Replaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = (self.linear(x) - self.mean).tanh().sin()
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y + x

    def build() -> World:
        model = nn.Sequential(*[Replaced() for _ in range(4)])
        world = training(model)
        world.extra = lambda: [m.calls for m in model]
        return world

    exact(build, steps=3)


@pytest.mark.parametrize("how", ["hook", "parametrization"])
def test_spectral_norm(how: str) -> None:
    norm = nn.utils.spectral_norm if how == "hook" else nn.utils.parametrizations.spectral_norm
    exact(lambda: training(nn.Sequential(*[m for _ in range(4) for m in (norm(nn.Linear(16, 16)), nn.Tanh())])))


def test_two_forwards_of_spectral_norm_before_the_backward() -> None:
    def build() -> World:
        norm = nn.utils.parametrizations.spectral_norm
        model = nn.Sequential(*[m for _ in range(4) for m in (norm(nn.Linear(16, 16)), nn.Tanh())])
        real, fake = data(), data()

        def step(call: Any) -> Tensor:
            loss = call(real).mean() - call(fake).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build)


@pytest.mark.parametrize("how", ["hook", "parametrization"])
def test_weight_norm(how: str) -> None:
    norm = (lambda m: nn.utils.parametrizations.weight_norm(m)) if how == "parametrization" else old_weight_norm
    exact(lambda: training(nn.Sequential(*[m for _ in range(4) for m in (norm(nn.Linear(16, 16)), nn.Tanh())])))


def old_weight_norm(module: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module)


def test_cached_parametrization() -> None:
    def build() -> World:
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh())])
        for m in model[::2]:
            nn.utils.parametrizations.orthogonal(m)
        x = data()

        def step(call: Any) -> Tensor:
            with nn.utils.parametrize.cached():
                loss = (call(x) + call(x.sin())).square().mean()
                loss.backward()
            return loss

        return World(model, step)

    exact(build)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, WIDTH)
            self.mid = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.mid[2].weight = self.mid[0].weight
            self.head = nn.Linear(WIDTH, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            h = self.embed(i)
            for m in self.mid:
                h = h + F.gelu(m(h))
            return self.head(h).log_softmax(-1)

    exact(lambda: training(Tied(), torch.randint(32, (ROWS,)), loss=lambda y: -y[:, 3].mean()))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm(momentum: float | None, train: bool, track: bool) -> None:
    def build() -> World:
        layers = [
            m
            for _ in range(3)
            for m in (
                nn.Linear(16, 16),
                nn.BatchNorm1d(16, momentum=momentum, track_running_stats=track),
                nn.ReLU(True),
            )
        ]
        return training(nn.Sequential(*layers).train(train))

    exact(build, steps=3)


@pytest.mark.parametrize("train", [True, False])
def test_instance_norm_with_running_statistics(train: bool) -> None:
    def build() -> World:
        layers = [
            m
            for _ in range(3)
            for m in (
                nn.Conv1d(8, 8, 3, padding=1),
                nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
                nn.GELU(),
            )
        ]
        return training(nn.Sequential(*layers).train(train), torch.randn(8, 8, 40))

    exact(build, steps=3)


def test_batch_norm_frozen_half_way() -> None:
    def build() -> World:
        model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())])
        world = training(model)
        plain = world.step
        count = iter(range(99))

        def step(call: Any) -> Tensor:
            for m in model[1::3]:
                m.train(next(count) % 4 < 2)
            return plain(call)

        world.step = step
        return world

    exact(build, steps=4)


# ---- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_dropout(inplace: bool) -> None:
    drop = nn.Dropout(0.3, inplace)
    check_body(lambda i, h: drop(h * 2).sin(), steps=3)


def test_every_dropout_and_random_layer() -> None:
    modules = [nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.Dropout1d(0.3), nn.RReLU(), nn.RReLU(inplace=True)]
    check_body(lambda i, h: modules[i](h * 2).sin(), steps=3)


@pytest.mark.parametrize("test", ["rrelu", "rnn"])
def test_random_layers_beside_a_thread(test: str) -> None:
    """Where another thread may draw, numbers drawn again are compared: those that are final when they are saved.

    ``rrelu`` saves its noise before it draws it, recurrent layers save parts of gates that they then compute in place.
    """
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        if test == "rrelu":
            test_every_dropout_and_random_layer()
        else:
            for kind in (nn.LSTM, nn.GRU):
                test_recurrent_layers(kind, packed=False)
    finally:
        stop.set()
        thread.join()


def test_random_operators() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        h = h + torch.randn_like(h) * torch.rand(WIDTH) + torch.randn(()).item() * 0
        h = h * torch.bernoulli(torch.full((ROWS, WIDTH), 0.5)) + torch.empty(ROWS, 1).uniform_().normal_(0, 0.1)
        h = h[torch.randperm(ROWS)] + torch.normal(0.0, 1.0, (WIDTH,)) + torch.poisson(h.detach().abs())
        h = h + F.gumbel_softmax(h, hard=True) + torch.randint(3, (WIDTH,))
        return h.tanh() * torch.multinomial(h.softmax(1), 1).float()

    check_body(body)


def test_explicit_generator() -> None:
    def build() -> World:
        g = torch.Generator().manual_seed(5)

        def body(i: int, h: Tensor) -> Tensor:
            mask = torch.bernoulli(torch.full((ROWS, WIDTH), 0.5), generator=g)
            return (h * mask).sin() * torch.rand(WIDTH, generator=g) + torch.randn(ROWS, 1, generator=g).cos() * h

        world = training(Net(body))
        world.extra = lambda: [g]
        return world

    exact(build, steps=3)


def test_explicit_generator_with_a_branch_on_data() -> None:
    def build() -> World:
        g = torch.Generator().manual_seed(5)

        def body(i: int, h: Tensor) -> Tensor:
            if h.sum().item() > 1e9:
                return h
            return (h * torch.bernoulli(torch.full((ROWS, WIDTH), 0.5), generator=g)).sin()

        world = training(Net(body))
        world.extra = lambda: [g]
        return world

    exact(build, steps=3)


def test_generators_that_the_model_owns() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.python, self.numpy = random.Random(1), np.random.default_rng(1)
            self.old, self.torch = np.random.RandomState(1), torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            scale = self.python.random() + self.numpy.random() + self.old.rand()
            self.torch.manual_seed(self.python.randrange(1000))
            return (self.linear(x) * scale).tanh().sin() * torch.rand(WIDTH, generator=self.torch)

    exact(lambda: training(nn.Sequential(*[Noisy() for _ in range(4)])), steps=3)


def test_seeding_inside_forward() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        torch.manual_seed(i)
        h = F.dropout(h, 0.5).sin()
        torch.manual_seed(99)
        return h * torch.rand_like(h)

    check_body(body, steps=3)


def test_fork_rng_inside_forward() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            h = F.dropout(h, 0.5).sin()
        return F.dropout(h, 0.5).cos()

    check_body(body, steps=3)


def test_python_and_numpy_random_numbers() -> None:
    check_body(lambda i, h: (h * random.random() + float(np.random.rand())).sin() * h, steps=3)


def test_stochastic_depth_by_python_random() -> None:
    check_body(lambda i, h: h.sin() * h if random.random() < 0.5 else h.exp().cos(), steps=6, deviates=True)


def test_stochastic_depth_by_torch_random() -> None:
    check_body(lambda i, h: h.sin() * h if torch.rand(()) < 0.5 else h.exp().cos(), steps=6, deviates=True)


# ---- autocast --------------------------------------------------------------------------------------------------------


def autocast_world(calls: int, backward_inside: bool) -> World:
    model = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())])
    x = data()

    def step(call: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(call(x * (k + 1)).float().square().mean() for k in range(calls))
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return loss

    return World(model, step)


def test_autocast_around_the_forward_only() -> None:
    exact(lambda: autocast_world(1, False))


def test_autocast_around_forward_and_backward() -> None:
    exact(lambda: autocast_world(1, True))


def test_autocast_with_weights_cached_by_an_earlier_call() -> None:
    exact(lambda: autocast_world(2, False), deviates=None)


def test_autocast_inside_the_forward() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=i != 2):
            return (h @ h.t()).softmax(-1).float() @ h

    check_body(body)


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers(kind: Any, packed: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(8, 8, num_layers=2, bidirectional=not packed, dropout=0.2, batch_first=True)
            self.out = nn.Linear(8 if packed else 16, 8)

        def forward(self, x: Tensor) -> Tensor:
            if packed:
                x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 3, 1]), batch_first=True)
            h, _ = self.rnn(x)
            if packed:
                h, _ = nn.utils.rnn.pad_packed_sequence(h, batch_first=True)
            return self.out(h.sin()).tanh()

    exact(lambda: training(Recurrent(), torch.randn(4, 4, 8)))


def test_recurrent_layers_are_measured_without_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their backward reads pointers out of a workspace: on made-up bytes the process would die."""
    monkeypatch.setattr(sys.modules["autoremat.engines.torch.recording.whole"], "measure_all", timing.measure_all)
    rnn = nn.LSTM(8, 8, batch_first=True)
    plan = autoremat.plan(lambda x: rnn(x)[0].mean(), torch.randn(4, 4, 8), budget=1.0, timing="measure")
    assert plan.program.timing == "measured"
    assert plan.program.seconds > 0


def test_multihead_attention_with_weights_and_mask() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                y, w = layer(x, x, x, key_padding_mask=mask, need_weights=i > 0)
                x = x + y * (w.mean() if w is not None else 1)
            return x

    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, 15:] = True
    exact(lambda: training(Attention(), torch.randn(4, 20, 16), mask))


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder(norm_first: bool) -> None:
    def build() -> World:
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, "gelu", batch_first=True, norm_first=norm_first)
        return training(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 20, 16))

    exact(build)


def test_convolutions_and_pooling() -> None:
    def build() -> World:
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2, return_indices=False), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8)]
        layers += [
            nn.Hardswish(inplace=True),
            nn.AdaptiveAvgPool2d(4),
            nn.ConvTranspose2d(8, 4, 2, 2),
            nn.LocalResponseNorm(2),
        ]
        layers += [
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.PixelShuffle(2),
            nn.Flatten(),
            nn.SiLU(inplace=True),
        ]
        return training(nn.Sequential(*layers), torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last))

    exact(build)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("sparse", [True, False])
def test_embedding_bag(mode: str, sparse: bool) -> None:
    if mode == "max" and sparse:
        pytest.skip("torch has no sparse gradient for it")

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(20, WIDTH, mode=mode, sparse=sparse)
            self.net = Net(lambda i, h: h.sin() * h, 3)

        def forward(self, i: Tensor, at: Tensor) -> Tensor:
            return self.net(self.bag(i, at))

    exact(lambda: training(Bag(), torch.randint(20, (2 * ROWS,)), torch.arange(0, 2 * ROWS, 2)))


def test_embedding_with_max_norm_renormalised_in_forward() -> None:
    class Renorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, WIDTH, max_norm=1.0)
            self.net = Net(lambda i, h: h.sin() * h, 3)

        def forward(self, i: Tensor) -> Tensor:
            return self.net(self.embed(i).exp() * self.embed(i.flip(0)).sin())

    exact(lambda: training(Renorm(), torch.randint(20, (ROWS,))))


def test_losses_and_linear_algebra() -> None:
    class Algebra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(lambda i, h: h.sin() * h, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.net(x)
            gram = h.t() @ h + 10 * torch.eye(WIDTH)
            whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), h.t(), upper=False).t()
            u, s, v = torch.linalg.svd(whitened * torch.arange(1.0, WIDTH + 1), full_matrices=False)
            logits = whitened @ torch.inverse(gram) + (u * s) @ v
            target = torch.arange(ROWS) % WIDTH
            return F.cross_entropy(logits, target) + F.smooth_l1_loss(h, logits) + torch.logdet(gram) * 1e-3

    exact(lambda: training(Algebra(), data(), loss=lambda y: y))


def test_sparse_tensors_inside() -> None:
    index = torch.stack([torch.arange(ROWS), torch.arange(ROWS).flip(0)])

    def body(i: int, h: Tensor) -> Tensor:
        graph = torch.sparse_coo_tensor(index, h[:, 0].exp(), (ROWS, ROWS), check_invariants=False)
        return torch.sparse.mm(graph, h).sin() * h

    check_body(body)


def test_boolean_indexing_and_nonzero() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        mask = h[:, 0] > 0
        y = torch.zeros_like(h)
        y[mask] = h[mask].exp().sin()
        y[~mask] = h[~mask].cos().tanh()
        return y * h

    check_body(body, deviates=None)  # other sizes at every step


def test_lazy_modules() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.lazy = nn.LazyLinear(WIDTH)
            self.net = Net(lambda i, h: h.sin() * h, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.lazy(self.first(x).tanh()))

    x = data()

    def build() -> World:
        model = Lazy()

        def step(call: Any) -> Tensor:
            loss = call(x).square().mean()
            loss.backward()
            return loss

        return World(model, step)

    exact(build, unplanned=None, steps=3)
