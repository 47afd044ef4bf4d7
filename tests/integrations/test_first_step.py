"""The first step, which has no plan before its forward has ended."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident

pytestmark = [pytest.mark.slow, pytest.mark.guard]


def test_what_the_plan_keeps_is_there_before_the_backward_begins() -> None:
    """Attention with dropout takes more inside of its call than a third of the room; later that is too much."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, tokens = RobertaForMaskedLM(config).train(), torch.randint(3, 250, (8, 128))

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    floor_bytes = autoremat.plan(loss, tokens, budget=1.0).floor_bytes
    step = autoremat.checkpoint(loss, budget=int(1.05 * floor_bytes))
    seen = account(lambda: step(tokens).backward(), resident(model, tokens))
    assert autoremat.stats(step).planned == 1
    assert seen.peak_bytes <= 1.05 * floor_bytes
