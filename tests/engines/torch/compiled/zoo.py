"""Small networks of the usual kinds, for the tests under Inductor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engines.torch.compiled.cases import Case, WithLoss, rows


class UNet(nn.Module):
    """Down, across and up, with skips."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([convolutions(1, width), convolutions(width, 2 * width)])
        self.middle = convolutions(2 * width, 4 * width)
        self.up = nn.ModuleList([convolutions(6 * width, 2 * width), convolutions(3 * width, width)])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat((F.interpolate(x, scale_factor=2.0), skips.pop()), 1))
        return F.mse_loss(self.head(x), y)


def convolutions(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1))


class LlamaBlock(nn.Module):
    """Attention with rotated positions, and a gated MLP, each after an RMS norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.upward = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.downward = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.downward(F.silu(self.gate(h)) * self.upward(h))


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 100.0 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


class Llama(nn.Module):
    """A stack of such blocks."""

    def __init__(self, blocks: int = 2, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.blocks = nn.Sequential(*[LlamaBlock(width, heads) for _ in range(blocks)])
        self.head = nn.Linear(width, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


class EncoderDecoder(nn.Module):
    """A small transformer of both halves."""

    def __init__(self, width: int = 32, layers: int = 1) -> None:
        super().__init__()
        self.both = nn.Transformer(width, 2, layers, layers, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.both(x, y), y)


def sentences() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 128, (4, 32)), torch.randint(0, 128, (4, 32))


def sequences() -> tuple[Tensor, Tensor]:
    return rows(4 * 16)[0].view(4, 16, 32), rows(4 * 16)[0].view(4, 16, 32)


UNET = Case("U-Net", UNet, lambda: (torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)), has_scratch=True)
LLAMA = Case("Llama", lambda: WithLoss(Llama()), sentences)
DECODER = Case("encoder and decoder", EncoderDecoder, sequences)
