from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from matplotlib.image import imread
from rich.console import Console

from autoremat.demo import data, models, train
from autoremat.demo.report import save_picture, summary, table
from autoremat.engines.torch.world.memory_account import Account


@pytest.fixture(scope="module")
def result() -> train.Result:
    """A tiny GPT, four steps in every way."""
    config = models.GPTConfig(blocks=3, width=16, heads=2, context=16, dropout=0.1)
    text = torch.arange(200, dtype=torch.uint8)
    task = train.Task(
        "tiny",
        "a tiny GPT",
        partial(models.GPT, config),
        lambda model, x, y: F.cross_entropy(model(x).flatten(0, 1), y.flatten()),
        partial(data.text_batches, text, 4, 16),
    )
    return train.run_task(task, 4)


@pytest.mark.slow
def test_every_variant_trains_the_same(result: train.Result) -> None:
    assert [row.name for row in result.rows] == [
        "plain",
        "torch checkpoint",
        "autoremat, 70%",
        "autoremat, 50%",
        "autoremat, 35%",
    ]
    assert all(row.same_gradients for row in result.rows)
    assert len({row.loss for row in result.rows}) == 1


@pytest.mark.slow
def test_autoremat_keeps_its_promises(result: train.Result) -> None:
    plain = result.rows[0].account.peak_bytes
    for row in result.rows[2:]:
        assert row.kept_promises
        assert row.account.peak_bytes <= row.budget_bytes < plain
        assert row.predicted_bytes == row.account.peak_bytes


@pytest.mark.slow
def test_nothing_is_left_behind_by_a_step(result: train.Result) -> None:
    assert len({row.account.end_bytes for row in result.rows}) == 1


@pytest.mark.slow
def test_a_broken_promise_is_noticed(result: train.Result) -> None:
    row = result.rows[2]
    assert not replace(row, same_gradients=False).kept_promises
    assert not replace(row, same_state=False).kept_promises
    assert not replace(row, budget_bytes=row.account.peak_bytes - 1).kept_promises


@pytest.mark.slow
def test_the_table_and_the_summary_say_what_happened(result: train.Result) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    row = replace(result.rows[2], same_gradients=False, at_floor=True)
    changed = replace(result, rows=(*result.rows[:2], row))
    console.print(table([changed]))
    text = console.export_text()
    assert "autoremat, 70%" in text
    line = next(line for line in text.splitlines() if "autoremat, 70%" in line)
    assert line.split()[-3:] == ["no", "yes", f"{row.loss:.4f}"]
    assert "…" not in text
    assert "0 of 1 runs above their budget, 1 of 1 not bit-identical" in summary([changed])
    assert "* the floor" in summary([changed])


@pytest.mark.slow
def test_the_picture_is_a_picture(result: train.Result, tmp_path: Path) -> None:
    save_picture([result, result], tmp_path / "memory.png")
    height, width = imread(tmp_path / "memory.png").shape[:2]
    assert height > 800
    assert width > 1000


def test_too_few_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least 4 steps, got 3"):
        train.run_task(train.Task("", "", torch.nn.Identity, lambda *_: torch.zeros(()), lambda: iter(())), 3)


def test_same_bits_tells_zeros_of_different_sign_apart() -> None:
    zero = torch.zeros(2)
    assert train._same_bits(zero, zero.clone())
    assert not train._same_bits(zero, -zero)
    assert train._same_bits(None, None)
    assert not train._same_bits(zero, None)


def test_an_account_without_events_has_the_peak_of_before() -> None:
    assert Account(5, (), ()).peak_bytes == 5


@pytest.mark.slow
@pytest.mark.guard
def test_a_budget_below_the_floor_changes_nothing_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at the end of a forward: which has drawn, and updated the statistics of batch norms."""
    monkeypatch.setattr(train, "BUDGETS", (0.05,))
    config = models.ResNetConfig(widths=(4, 8), blocks_per_stage=1, dropout=0.5)
    images, labels = data.digits(size=8)
    task = train.Task(
        "tiny",
        "a tiny ResNet",
        partial(models.ResNet, config),
        lambda model, x, y: F.cross_entropy(model(x), y),
        partial(data.image_batches, images, labels, 16),
    )
    row = train.run_task(task, 4).rows[-1]
    assert row.at_floor
    assert row.kept_promises
