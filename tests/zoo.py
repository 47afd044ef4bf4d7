"""Small networks of the usual kinds, each with a loss and inputs: what the step is tested on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A network to train.

    Attributes:
        name: what it is.
        model: makes it.
        loss: makes its loss function, which runs the whole forward.
        inputs: makes the inputs of the loss function.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Loss]
    inputs: Callable[[], tuple[Tensor, ...]]

    def __str__(self) -> str:
        return self.name


class UNet(nn.Module):
    """Three levels, long skips by concatenation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.down = nn.ModuleList([_double(1, w), _double(w, 2 * w), _double(2 * w, 4 * w)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.ConvTranspose2d(2 * w, w, 2, 2)])
        self.join = nn.ModuleList([_double(4 * w, 2 * w), _double(2 * w, w)])
        self.head = nn.Conv2d(w, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in (inputs, outputs):
        layers += [nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class DenseNet(nn.Module):
    """Two dense blocks: every layer reads all layers before it."""

    def __init__(self, growth: int = 8, layers: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, growth, 3, padding=1)
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        channels = growth
        for _ in range(2):
            self.blocks.append(nn.ModuleList(self._layer(channels + i * growth, growth) for i in range(layers)))
            channels += layers * growth
            self.transitions.append(nn.Sequential(nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2)))
            channels //= 2
        self.head = nn.Linear(channels, 10)

    @staticmethod
    def _layer(inputs: int, growth: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, growth, 3, padding=1), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            for layer in block:
                x = torch.cat([x, layer(x)], 1)
            x = transition(x)
        return self.head(x.mean((2, 3)))


class UnrolledLSTM(nn.Module):
    """Four layers over 64 steps, every gate written out."""

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(2 * width, 4 * width) for _ in range(layers))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = [(x.new_zeros(x.shape[1:]), x.new_zeros(x.shape[1:])) for _ in self.gates]
        for step in x:
            below = step
            for k, gates in enumerate(self.gates):
                h, c = state[k]
                i, f, g, o = gates(torch.cat([below, h], 1)).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                below = o.sigmoid() * c.tanh()
                state[k] = below, c
        return self.head(below)


class Translator(nn.Module):
    """An encoder-decoder Transformer."""

    def __init__(self, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, 4, 2, 2, 4 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.transformer(self.embed(source), self.embed(target), tgt_mask=mask))


def xor_mlp() -> nn.Module:
    """Widths 2-200-500-1000(x9)-500-200-100-50-2."""
    widths = [2, 200, 500, *[1000] * 9, 500, 200, 100, 50, 2]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _xor() -> tuple[Tensor, Tensor]:
    x = torch.rand(2048, 2)
    return x, ((x[:, 0] > 0.5) ^ (x[:, 1] > 0.5)).long()


def _classify(model: nn.Module) -> Loss:
    return lambda x, y: F.cross_entropy(model(x), y)


def _next_token(model: nn.Module) -> Loss:
    return lambda x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def _translate(model: nn.Module) -> Loss:
    return lambda x, y: F.cross_entropy(model(x, y[:, :-1]).flatten(0, 1), y[:, 1:].flatten())


def _tokens(batch: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length))


CASES = (
    Case(
        "GPT",
        lambda: GPT(GPTConfig(blocks=6, width=48, context=64, dropout=0.1)),
        _next_token,
        lambda: (_tokens(8, 64, 256), _tokens(8, 64, 256)),
    ),
    Case(
        "pre-activation ResNet",
        lambda: ResNet(ResNetConfig(widths=(8, 16, 24), blocks_per_stage=2)),
        _classify,
        lambda: (torch.randn(16, 1, 24, 24), torch.randint(0, 10, (16,))),
    ),
    Case("U-Net", UNet, _classify, lambda: (torch.randn(4, 1, 32, 32), torch.randint(0, 2, (4, 32, 32)))),
    Case("DenseNet", DenseNet, _classify, lambda: (torch.randn(8, 1, 24, 24), torch.randint(0, 10, (8,)))),
    Case("unrolled LSTM", UnrolledLSTM, _classify, lambda: (torch.randn(64, 16, 32), torch.randint(0, 4, (16,)))),
    Case("encoder-decoder", Translator, _translate, lambda: (_tokens(8, 24, 50), _tokens(8, 20, 50))),
    Case("XOR MLP", xor_mlp, _classify, _xor),
)
