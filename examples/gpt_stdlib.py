"""Train a byte-level GPT on the source text of Python's standard library, within half of the memory it takes plainly.

    python examples/gpt_stdlib.py [steps] [budget]

The budget is what `autoremat.checkpoint` takes: "120MB", "0.5", "50%".
"""

import sys

import torch
import torch.nn.functional as F

import autoremat
from autoremat.demo.data import stdlib_bytes, text_batches
from autoremat.demo.models import GPT, GPTConfig


def main(steps: int = 100, budget: str = "50%") -> None:
    """Train, then print the plan and a few lines of what the model has learned."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(blocks=8, width=128, heads=4, context=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # The function returns the loss, so that all memory of forward and backward lies inside.
    @autoremat.checkpoint(budget=budget, optimizer=optimizer)
    def loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    batches = text_batches(stdlib_bytes(), batch=8, context=256)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(*next(batches))
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    print(autoremat.stats(loss_fn).plan)
    print(sample(model, b"def ", 200))


@torch.no_grad()
def sample(model: GPT, prompt: bytes, count: int) -> str:
    """Continue the prompt by ``count`` bytes."""
    text = list(prompt)
    for _ in range(count):
        window = torch.tensor([text[-model.config.context :]])
        text.append(int(torch.multinomial(model(window)[0, -1].softmax(-1), 1)))
    return bytes(text).decode(errors="replace")


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, str), sys.argv[1:], strict=False)))
