from __future__ import annotations

import pytest
import torch
from torch import nn

from autoremat.demo.models import GPT, Block, GPTConfig, PreActBlock, ResNet, ResNetConfig, checkpoint_every_block
from autoremat.engines.torch.world.memory_account import account

SMALL_GPT = GPTConfig(blocks=2, width=16, heads=2, context=8, vocabulary=11, dropout=0.1)
SMALL_RESNET = ResNetConfig(widths=(4, 8), blocks_per_stage=1, classes=5)


def test_gpt_gives_logits_for_every_position() -> None:
    assert GPT(SMALL_GPT)(torch.zeros(3, 7, dtype=torch.int64)).shape == (3, 7, 11)


def test_gpt_looks_only_back() -> None:
    model = GPT(SMALL_GPT).eval()
    x = torch.arange(8).view(1, 8)
    changed = x.clone()
    changed[0, 5] = 0
    same = torch.isclose(model(x), model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_resnet_gives_scores() -> None:
    assert ResNet(SMALL_RESNET)(torch.zeros(3, 1, 16, 16)).shape == (3, 5)


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 4)])
def test_a_residual_block_halves_the_image_with_its_stride(stride: int, size: int) -> None:
    assert PreActBlock(3, 6, stride, dropout=0.0)(torch.zeros(2, 3, 8, 8)).shape == (2, 6, size, size)


def test_dropout_acts_in_training_only() -> None:
    model = GPT(SMALL_GPT)
    x = torch.zeros(2, 8, dtype=torch.int64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_checkpointing_every_block_changes_memory_and_not_the_gradients() -> None:
    def gradients(checkpointed: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(blocks=4, width=16, heads=2, context=32))
        if checkpointed:
            assert checkpoint_every_block(model) is model
        x = torch.randint(256, (4, 32))
        seen = account(lambda: model(x).sum().backward())
        return [p.grad for p in model.parameters()], seen.peak_bytes

    (plain, plain_peak), (again, again_peak) = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert again_peak < plain_peak


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Block(SMALL_GPT)])
def test_checkpointing_blocks_of_a_model_without_blocks_is_an_error(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="has no ModuleList called 'blocks'"):
        checkpoint_every_block(model)
