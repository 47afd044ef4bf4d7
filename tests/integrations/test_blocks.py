"""The blocks of the docs that need other libraries: each runs, and the training that it sets up does."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import autoremat
from tests.integrations.lightning_net import ROWS, WIDTH, Net
from tests.integrations.lightning_net import pytestmark as lightnings
from tests.integrations.transformers_models import examples, gpt2
from tests.integrations.transformers_models import pytestmark as transformers_

ROOT = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{n}")
    for page in (ROOT / "README.md", ROOT / "docs" / "trainers.md")
    for n, block in enumerate(re.findall(r"^```py\n(.*?)^```", page.read_text(), re.M | re.S))
]
pytestmark = [*lightnings, *transformers_]


def names(folder: Path) -> dict[str, Any]:
    """What a reader has at hand."""
    model = gpt2()
    data = examples(model)
    quick = functools.partial(
        lightning.Trainer, fast_dev_run=True, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    return {
        "Trainer": Trainer, "model": model, "data": data, "autoremat": autoremat,
        "args": TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to=[], save_strategy="no"),
        "lightning": SimpleNamespace(Trainer=quick), "accelerator": Accelerator(cpu=True),
        "optimizer": torch.optim.Adam(model.parameters()), "loader": DataLoader(data, batch_size=4),
    }  # fmt: skip


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS)
def test_block_trains(block: str, tmp_path: Path) -> None:
    found = names(tmp_path)
    exec(compile(block, "docs", "exec"), found)
    if "Trainer(model" in block:
        found["trainer"].train()
        assert found["callback"].stats().plan is not None
    elif "lightning" in block:
        loader = DataLoader(TensorDataset(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)), batch_size=ROWS)
        net = Net(by="loss")
        found["trainer"].fit(net, loader, loader)
        assert len(net.losses) == 1
    else:
        loss = found["loss_fn"](next(iter(found["loader"])))
        found["accelerator"].backward(loss)
        assert autoremat.stats(found["loss_fn"]).plan is not None
