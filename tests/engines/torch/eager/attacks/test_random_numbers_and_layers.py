"""Attacks on random numbers, autocast and layers of every kind: all as in plain training."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.operators import timing
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import ROWS, WIDTH, Net, check_body, data, training

__all__ = ["quick"]  # a fixture

# ---- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_dropout(inplace: bool) -> None:
    drop = nn.Dropout(0.3, inplace)
    check_body(lambda i, h: drop(h * 2).sin(), steps=3)


def test_every_dropout_and_random_layer() -> None:
    modules = [nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2), nn.Dropout1d(0.3), nn.RReLU(), nn.RReLU(inplace=True)]
    check_body(lambda i, h: modules[i](h * 2).sin(), steps=3)


@pytest.mark.one_in(2, guard=True)
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


@pytest.mark.one_in(3, guard=True)
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
