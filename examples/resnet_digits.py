"""Train a pre-activation ResNet on scikit-learn's digits within a budget; the model stays the object it was.

    python examples/resnet_digits.py [steps] [budget]

The network has what makes checkpointing by hand go wrong: batch norm, in-place activations and dropout.
"""

import sys

import torch
import torch.nn.functional as F

import autoremat
from autoremat.demo.data import digits, image_batches
from autoremat.demo.models import ResNet, ResNetConfig


def main(steps: int = 150, budget: str = "40%") -> None:
    """Train, print the plan, then the accuracy on images the model has not seen."""
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(widths=(16, 32, 64), blocks_per_stage=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    autoremat.checkpoint(model, budget=budget, optimizer=optimizer)

    batches = image_batches(*digits("train"), batch=64)
    for step in range(steps):
        x, y = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}")
    print(autoremat.stats(model).plan)
    autoremat.restore(model)
    print(f"accuracy on unseen digits: {accuracy(model):.1%}")


@torch.no_grad()
def accuracy(model: ResNet) -> float:
    """Share of the validation images that are classified right."""
    model.eval()
    images, labels = digits("validation")
    return (model(images).argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, str), sys.argv[1:], strict=False)))
