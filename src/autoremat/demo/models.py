"""The networks of the demo, the examples, tests and benchmarks.

They are plain ``torch.nn``, nothing of autoremat.

Shapes: B batch, T tokens, D width, H heads, V vocabulary; C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a byte-level GPT.

    Attributes:
        blocks: number of Transformer blocks.
        width: width D of the residual stream; a multiple of ``heads``.
        heads: attention heads.
        context: longest sequence T.
        vocabulary: number of tokens V; 256 bytes by default.
        dropout: probability, on attention weights and on both residual branches.
    """

    blocks: int = 8
    width: int = 128
    heads: int = 4
    context: int = 256
    vocabulary: int = 256
    dropout: float = 0.0


class Block(nn.Module):
    """One pre-norm Transformer block: causal attention, then a GELU MLP.

    It takes ``[B, T, D]`` to ``[B, T, D]``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.norm1 = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the MLP, to the residual stream."""
        x = x + self._drop(self.proj(self._attention(self.norm1(x))))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return y.transpose(1, 2).reshape(batch, tokens, width)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """A decoder-only Transformer on bytes: ``int64[B, T]`` to logits ``float32[B, T, V]``."""

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a pre-activation ResNet for small grey images.

    Attributes:
        widths: channels of each stage; every stage after the first halves the image.
        blocks_per_stage: residual blocks in each stage.
        classes: number of classes.
        dropout: probability between the two convolutions of a block.
    """

    widths: tuple[int, ...] = (24, 48, 96)
    blocks_per_stage: int = 3
    classes: int = 10
    dropout: float = 0.1


class PreActBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016).

    Norm, in-place ReLU, convolution, dropout, and once more.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take ``[B, C, H, W]`` to ``[B, outputs, H/stride, W/stride]``."""
        y = self.conv1(self.relu(self.norm1(x)))
        y = self.conv2(self.drop(self.relu(self.norm2(y))))
        y += self.shortcut(x)
        return y


class ResNet(nn.Module):
    """A pre-activation ResNet: ``float32[B, 1, H, W]`` to logits ``float32[B, classes]``."""

    def __init__(self, config: ResNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ResNetConfig()
        self.stem = nn.Conv2d(1, config.widths[0], 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(_stages(config))
        self.norm = nn.BatchNorm2d(config.widths[-1])
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(config.widths[-1], config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.relu(self.norm(x)).mean((2, 3)))


def _stages(config: ResNetConfig) -> list[PreActBlock]:
    """Build the residual blocks of all stages in order."""
    blocks, inputs = [], config.widths[0]
    for stage, width in enumerate(config.widths):
        for i in range(config.blocks_per_stage):
            stride = 2 if stage > 0 and i == 0 else 1
            blocks.append(PreActBlock(inputs, width, stride, config.dropout))
            inputs = width
    return blocks


def checkpoint_every_block(model: nn.Module) -> nn.Module:
    """Put ``torch.utils.checkpoint`` (non-reentrant) around each of ``model.blocks``; returns the same model.

    This is what people do by hand today, and what autoremat is compared with.

    Raises:
        TypeError: the model has no module list called ``blocks``.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{type(model).__name__} has no ModuleList called 'blocks'; wrap its layers by hand instead")
    for block in blocks:
        block.forward = _checkpointed(block.forward)
    return model


def _checkpointed(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return checkpoint(forward, x, use_reentrant=False)

    return run
