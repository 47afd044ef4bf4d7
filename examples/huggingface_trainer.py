"""Train a byte-level GPT-2 with Hugging Face's Trainer on the source text of Python's standard library, in a budget.

    pip install 'autoremat[transformers]'
    python examples/huggingface_trainer.py [steps] [budget]

Needs no network: bytes are the tokens, and the weights are random.
"""

import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autoremat.demo.data import stdlib_bytes
from autoremat.integrations.transformers import AutorematCallback

CONTEXT = 128


def main(steps: int = 20, budget: str = "50%") -> None:
    """Train, then print the plan."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    text = torch.as_tensor(stdlib_bytes()).long()
    rows = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    callback = AutorematCallback(budget=budget)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3,
            max_grad_norm=1.0, logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows[:2048]]
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    print(callback.stats().plan)


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, str), sys.argv[1:], strict=False)))
