"""``lightning.Trainer`` with the real library: the same bits as without autoremat, and within the budget."""

from __future__ import annotations

import warnings
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from autoremat.checkpointed import session_of
from autoremat.integrations.lightning import AutorematCallback
from tests.integrations.lightning_net import BATCHES, ROWS, WIDTH, Net, pytestmark
from tests.integrations.meter import SCALARS, Meter

__all__ = ["pytestmark"]


class Metered(lightning.Callback):
    """The peak of every batch, the optimizer's step included."""

    def __init__(self) -> None:
        self.meter = Meter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.meter.start(pl_module, *trainer.optimizers, *batch)

    def on_train_batch_end(self, *args: Any) -> None:
        self.meter.stop()


def fit(callbacks: list[Any], module: dict[str, Any], **options: Any) -> tuple[Any, list[Any], list[int], list[str]]:
    """The module, every number that the training leaves behind, the peaks of its batches, and autoremat's warnings."""
    torch.manual_seed(0)
    net, metered = Net(**module), Metered()
    data = torch.utils.data.TensorDataset(*torch.randn(2, BATCHES * ROWS, WIDTH))
    loader = torch.utils.data.DataLoader(data, batch_size=ROWS)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks, metered], val_check_interval=2, **options,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "autoremat", RuntimeWarning)
        trainer.fit(net, loader, loader)
    metrics = sorted((k, float(v)) for k, v in trainer.callback_metrics.items())
    numbers = [*net.losses, *net.state_dict().values(), metrics, torch.get_rng_state()]
    return net, numbers, metered.meter.peaks, [str(w.message) for w in caught]


def assert_same(got: list[Any], plain: list[Any]) -> None:
    assert len(got) == len(plain)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({"by": "loss"}, {}),
        ({"by": "forward", "manual": True}, {}),
        ({"by": "loss", "manual": True}, {}),
        ({"by": "loss"}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ({"by": "body"}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    ],
    ids=[
        "automatic",
        "manual",
        "manual, the loss inside",
        "accumulating in bf16, the loss inside",
        "accumulating in bf16",
    ],
)
def test_trainer_is_exact_and_within_the_budget(module: dict[str, Any], options: dict[str, Any]) -> None:
    _, plain, plain_peaks, _ = fit([], module, **options)
    callback = AutorematCallback(budget=0.8, target=module["by"], time_limit_seconds=1)
    net, mine, peaks, messages = fit([callback], module, **options)
    assert_same(mine, plain)
    assert messages == []
    stats = callback.stats()
    assert stats.reruns > 0
    assert (stats.deviations, stats.unplanned) == (0, 0)
    assert stats.plan is not None
    assert 0 < max(peaks[3:]) < max(plain_peaks[3:])  # the first batches are planned under way
    budget = stats.plan.budget_bytes
    if module["by"] == "loss":  # then nothing else is outside
        assert max(peaks[3:]) <= budget + SCALARS
    assert session_of(net) is None
    assert session_of(net.body) is None
    assert "loss" not in vars(net)


def test_a_target_that_is_not_called_is_told() -> None:
    _, plain, _, _ = fit([], {"by": "body"})
    _, mine, _, messages = fit([AutorematCallback(budget=0.8, time_limit_seconds=1)], {"by": "body"})
    assert_same(mine, plain)
    assert len(messages) == 1
    assert "training_step of Net has not called 'forward', so nothing is checkpointed; name" in messages[0]


def test_everything_is_as_it_was_after_an_error() -> None:
    class Breaks(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise ZeroDivisionError

    callback = AutorematCallback(budget=0.8, target="loss", time_limit_seconds=1)
    net = None

    class Remembers(lightning.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            nonlocal net
            net = pl_module
            assert session_of(pl_module.loss) is not None

    with pytest.raises(ZeroDivisionError):
        fit([callback, Remembers(), Breaks()], {"by": "loss"})
    assert "loss" not in vars(net)
    assert callback.stats().calls == 1


def test_what_cannot_be_a_target() -> None:
    with pytest.raises(ValueError, match="put the computation of the loss into a method of its own"):
        AutorematCallback(budget=0.5, target="training_step")
    with pytest.raises(AttributeError, match="nowhere"):
        fit([AutorematCallback(budget=0.5, target="nowhere")], {})
    with pytest.raises(ValueError, match="budget"):
        AutorematCallback(budget="10 potatoes")
