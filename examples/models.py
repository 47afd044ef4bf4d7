"""Training steps for the command line. All but the small one are on the ``meta`` device: no memory is taken.

autoremat plan examples/models.py:gpt --budget 50%
autoremat explain examples/models.py:resnet
autoremat check examples/models.py:small_gpt --budget 50%
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoremat.demo.models import GPT, GPTConfig, ResNet, ResNetConfig

Step = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def gpt() -> Step:
    """A GPT of 85 million parameters, 8 sequences of 1024 tokens."""
    with torch.device("meta"):
        model = GPT(GPTConfig(blocks=12, width=768, heads=12, context=1024))
        tokens = torch.zeros(8, 1024, dtype=torch.int64)
    return with_loss(model), (tokens, tokens)


def resnet() -> Step:
    """A ResNet of 18 blocks, 512 images of 64 x 64."""
    with torch.device("meta"):
        model = ResNet(ResNetConfig(widths=(32, 64, 128), blocks_per_stage=6))
        images, classes = torch.zeros(512, 1, 64, 64), torch.zeros(512, dtype=torch.int64)
    return with_loss(model), (images, classes)


def small_gpt() -> Step:
    """A small GPT with real tensors, to be run: ``autoremat check``."""
    model = GPT(GPTConfig(blocks=4, width=128, context=128))
    tokens = torch.randint(0, 256, (8, 128))
    return with_loss(model), (tokens, tokens)


def with_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The function to record: it returns the loss, so that all memory of the step lies inside."""

    def step(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, -2), target.flatten())

    return step
