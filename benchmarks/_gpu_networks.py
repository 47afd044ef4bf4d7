"""The networks of ``benchmarks/gpu.py``: plain ``torch.nn`` with random weights, nothing downloaded.

Each has ``blocks``, which ``torch.utils.checkpoint`` is put around. Shapes: B batch, T tokens, D width, H heads,
K heads of keys and values, V vocabulary; C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from autoremat.demo.models import GPT, GPTConfig

# ---- Llama -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-shaped decoder.

    Attributes:
        blocks: number of blocks.
        width: D, a multiple of ``heads``.
        heads: H, of queries.
        pairs: K, heads of keys and values; divides ``heads``.
        hidden: width of the gated layer.
        vocabulary: V.
        context: longest sequence T.
    """

    blocks: int
    width: int
    heads: int
    pairs: int
    hidden: int
    vocabulary: int
    context: int


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32 as the Llama code does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return self.weight * y.to(x.dtype)


class LlamaBlock(nn.Module):
    """Rotary, grouped-query, causal attention, then SwiGLU; both after a norm and beside a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        head = config.width // config.heads
        self.heads, self.pairs, self.head = config.heads, config.pairs, head
        self.norm1, self.norm2 = RMSNorm(config.width), RMSNorm(config.width)
        self.q = nn.Linear(config.width, config.heads * head, bias=False)
        self.k = nn.Linear(config.width, config.pairs * head, bias=False)
        self.v = nn.Linear(config.width, config.pairs * head, bias=False)
        self.out = nn.Linear(config.heads * head, config.width, bias=False)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[B, T, D]`` and the tables of angles ``[T, D / H]`` to ``[B, T, D]``."""
        x = x + self.out(self._attention(self.norm1(x), cos, sin))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = rotated(self._split(self.q(x), self.heads), cos, sin)
        k = rotated(self._split(self.k(x), self.pairs), cos, sin)
        k, v = (self._for_every_query(t) for t in (k, self._split(self.v(x), self.pairs)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).reshape(batch, tokens, -1)

    def _for_every_query(self, x: Tensor) -> Tensor:
        return x[:, :, None].expand(-1, -1, self.heads // self.pairs, -1, -1).flatten(1, 2)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head).transpose(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): ``[B, H, T, D / H]`` turned by the angles, in the dtype of ``x``."""
    one, other = x.chunk(2, -1)
    return (x * cos + torch.cat((-other, one), -1) * sin).to(x.dtype)


class Llama(nn.Module):
    """A Llama-shaped decoder: ``int64[B, T]`` to logits ``[B, T, V]``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.blocks))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        head = config.width // config.heads
        frequency = 10_000.0 ** (-torch.arange(0, head, 2).float() / head)
        angle = torch.outer(torch.arange(config.context).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        x, n = self.token(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:n], self.sin[:n])
        return self.head(self.norm(x))


# ---- ResNet-50 -------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """The bottleneck block of He et al. 2016, stride in the 3 x 3 convolution, in-place ReLU."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, 4 width, H / stride, W / stride]``."""
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """ResNet: ``[B, 3, H, W]`` to scores ``[B, classes]``; depths (3, 4, 6, 3) and width 64 are ResNet-50."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )  # fmt: skip
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(Bottleneck(inputs, width << stage, 2 if stage and not i else 1))
                inputs = 4 * (width << stage)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


# ---- U-Net -----------------------------------------------------------------------------------------------------------


def double_convolution(inputs: int, outputs: int) -> nn.Module:
    """Two 3 x 3 convolutions, each with batch norm and in-place ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015): ``[B, 3, H, W]`` to scores ``[B, classes, H, W]``.

    ``blocks``: ``levels`` on the way down, the middle, ``levels`` on the way up.
    """

    def __init__(self, levels: int = 4, width: int = 64, classes: int = 4) -> None:
        super().__init__()
        sizes = [width << k for k in range(levels + 1)]
        down = [double_convolution(i, o) for i, o in zip([3, *sizes], sizes, strict=False)]
        up = [double_convolution(2 * size, size) for size in reversed(sizes[:-1])]
        self.blocks = nn.ModuleList([*down, *up])
        self.lift = nn.ModuleList(nn.ConvTranspose2d(2 * size, size, 2, 2) for size in reversed(sizes[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of every pixel."""
        x, levels = images, len(self.lift)
        across = []
        for block in self.blocks[:levels]:
            across.append(block(x))
            x = F.max_pool2d(across[-1], 2)
        x = self.blocks[levels](x)
        for lift, block in zip(self.lift, self.blocks[levels + 1 :], strict=True):
            x = block(torch.cat((across.pop(), lift(x)), 1))
        return self.head(x)


# ---- what is measured ------------------------------------------------------------------------------------------------

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Network:
    """A network and how it is trained.

    Attributes:
        name: for people, with the sizes.
        model: makes the module, on the CPU.
        inputs: makes the inputs for a batch of so many items, on the CPU.
        loss: of the module's output and the targets; the last input is the targets.
        batch: items in a batch at scale 1, where they fit.
        dtype: of autocast; None for none.
        channels_last: whether module and images have that memory format.
        strict: whether all of its CUDA kernels have a deterministic kind; torch refuses max pooling otherwise.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    dtype: torch.dtype | None = torch.bfloat16
    channels_last: bool = False
    strict: bool = True


def loss_of(network: Network, model: nn.Module) -> Loss:
    """The callable that is trained: forward and loss, under autocast where the network asks for it.

    Attention is by flash or memory-efficient kernels: the same ones with deterministic algorithms and without, where
    cuDNN's are left out.
    """

    def loss(*inputs: Tensor) -> Tensor:
        *given, targets = inputs
        low = torch.autocast(inputs[0].device.type, network.dtype, enabled=network.dtype is not None)
        with low, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = model(*given)
        return network.loss(out.float(), targets)

    return loss


@contextlib.contextmanager
def every_block_checkpointed(model: Any) -> Iterator[None]:
    """``torch.utils.checkpoint`` (non-reentrant) around each of ``model.blocks`` for forwards inside the block."""
    for block in model.blocks:
        block.forward = _checkpointed(block.forward)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.forward


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every position: ``[B, T, V]`` and ``int64[B, T]``."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tokens(vocabulary: int, length: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of random tokens, and as many targets."""
    return lambda batch: tuple(torch.randint(0, vocabulary, (2, batch, length)).unbind())


def labelled_images(size: int, classes: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of random images with a class each."""
    return lambda batch: (torch.randn(batch, 3, size, size), torch.randint(0, classes, (batch,)))


def labelled_pixels(size: int, classes: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches of random images with a class for every pixel."""
    return lambda batch: (torch.randn(batch, 3, size, size), torch.randint(0, classes, (batch, size, size)))


def each_pixel(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of every pixel: ``[B, C, H, W]`` and ``int64[B, H, W]``."""
    return F.cross_entropy(scores.permute(0, 2, 3, 1).flatten(0, 2), targets.flatten())


def gpt(name: str, config: GPTConfig, batch: int, dtype: torch.dtype | None = torch.bfloat16) -> Network:
    """A GPT on sequences as long as its context."""
    inputs = tokens(config.vocabulary, config.context)
    return Network(name, lambda: GPT(config), inputs, next_token, batch, dtype)


def llama(name: str, config: LlamaConfig, batch: int) -> Network:
    """A Llama on sequences as long as its context."""
    return Network(name, lambda: Llama(config), tokens(config.vocabulary, config.context), next_token, batch)


GPT2_MEDIUM = GPTConfig(blocks=24, width=1024, heads=16, context=1024, vocabulary=50257, dropout=0.1)
GPT2_LARGE = GPTConfig(blocks=36, width=1280, heads=20, context=1024, vocabulary=50257, dropout=0.1)


def llama_config(size: str, context: int) -> LlamaConfig:
    """``"1B"``: Llama 3.2's 1B with 32,000 tokens in its vocabulary; ``"300M"``: 0.6 of its width."""
    blocks, width, heads, pairs, hidden = {"1B": (16, 2048, 32, 8, 8192), "300M": (16, 1152, 18, 6, 3072)}[size]
    return LlamaConfig(blocks, width, heads, pairs, hidden, 32_000, context)


NETWORKS: dict[str, Network] = {
    "gpt2-medium": gpt("GPT-2 medium, 1024 tokens, dropout 0.1, bf16", GPT2_MEDIUM, 8),
    "gpt2-large": gpt("GPT-2 large, 1024 tokens, dropout 0.1, bf16", GPT2_LARGE, 8),
    "llama-1b-2k": llama("Llama 1B, 2048 tokens, bf16", llama_config("1B", 2048), 4),
    "llama-1b-8k": llama("Llama 1B, 8192 tokens, bf16", llama_config("1B", 8192), 1),
    "llama-300m-2k": llama("Llama 300M, 2048 tokens, bf16", llama_config("300M", 2048), 8),
    "llama-300m-8k": llama("Llama 300M, 8192 tokens, bf16", llama_config("300M", 8192), 2),
    "resnet50": Network(
        "ResNet-50, 224 x 224, bf16, channels last", ResNet, labelled_images(224, 1000), F.cross_entropy, 128,
        channels_last=True, strict=False,
    ),
    "unet": Network(
        "U-Net, 256 x 256, float32 (TF32)", UNet, labelled_pixels(256, 4), each_pixel, 16, dtype=None, strict=False,
    ),
}  # fmt: skip
"""By the name of the part."""


def _small_llama(context: int) -> LlamaConfig:
    return LlamaConfig(blocks=1, width=32, heads=4, pairs=2, hidden=64, vocabulary=64, context=context)


_SMALL_GPT = GPTConfig(blocks=2, width=32, heads=2, context=64, vocabulary=64, dropout=0.1)

SMALL: dict[str, Network] = {
    "gpt2-medium": gpt("small GPT, bf16", _SMALL_GPT, 4),
    "llama-1b-2k": llama("small Llama, bf16", _small_llama(64), 4),
    "resnet50": Network(
        "small ResNet, channels last", lambda: ResNet((2, 1), 8, 10), labelled_images(32, 10), F.cross_entropy, 8, None,
        channels_last=True, strict=False,
    ),
    "unet": Network("small U-Net", lambda: UNet(1, 8), labelled_pixels(32, 4), each_pixel, 4, None, strict=False),
}  # fmt: skip
"""Of the same kinds, for the dry run; shapes that differ in size alone are left out."""
