"""Small models of Hugging Face with data to train them on, and the warnings of that library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

pytestmark = [
    pytest.mark.slow,
    # The data loader of every machine without an accelerator says so.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # transformers looks whether its tensors are fake, so the first step leaves the recorded path, and says so.
    pytest.mark.filterwarnings("ignore:autoremat. a step left the path:RuntimeWarning"),
]


VOCABULARY, CONTEXT, BATCH = 64, 64, 4


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
        )
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
        )
    )  # fmt: skip


def examples(model: nn.Module) -> list[dict[str, Tensor]]:
    rows = torch.randint(VOCABULARY, (48, CONTEXT), generator=torch.Generator().manual_seed(1))
    if isinstance(model, GPT2LMHeadModel):
        return [{"input_ids": row, "labels": row} for row in rows]
    return [{"input_ids": row, "labels": row[0] % 2} for row in rows]
