"""A module for ``lightning.Trainer``, and the warnings of that library."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = [
    pytest.mark.slow,
    # Lightning's advice on workers, on batches of a data set that small, and on how it imports torch's parts.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]
WIDTH, ROWS, BATCHES = 32, 128, 6


class Net(lightning.LightningModule):
    """A module that logs and keeps its losses; ``by`` says what ``training_step`` calls."""

    def __init__(self, *, manual: bool = False, by: str = "forward") -> None:
        super().__init__()
        self.body = nn.Sequential(*[self.layer() for _ in range(4)])
        self.by, self.losses = by, []
        self.automatic_optimization = not manual

    @staticmethod
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(x, y) if self.by == "loss" else F.mse_loss((self if self.by == "forward" else self.body)(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.detach().clone())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
