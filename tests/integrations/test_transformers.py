"""Hugging Face ``Trainer`` with the real library: the same bits as without autoremat, and within the budget."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import autoremat
from autoremat.checkpointed import session_of
from autoremat.integrations.transformers import AutorematCallback
from tests.integrations.meter import Meter
from tests.integrations.transformers_models import BATCH, CONTEXT, bert, examples, gpt2, pytestmark

__all__ = ["pytestmark"]


@dataclass
class Trained:
    """What a training leaves behind."""

    trainer: Any
    peaks: list[int]
    messages: list[str]
    numbers: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        kept = ("loss", "grad_norm", "eval_loss")
        self.numbers += [[entry.get(k) for k in kept] for entry in self.trainer.state.log_history]
        self.numbers += [v.clone() for v in self.trainer.model.state_dict().values()]
        self.numbers += [torch.get_rng_state()]


class Metered(TrainerCallback):
    """The peak of every step of the optimizer, from the first forward to the gradients' end."""

    def __init__(self) -> None:
        self.meter = Meter()

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
        inputs = torch.zeros(BATCH * args.gradient_accumulation_steps, CONTEXT, dtype=torch.long)
        self.meter.start(model, optimizer, inputs)

    def on_step_end(self, *args: Any, **others: Any) -> None:
        self.meter.stop()


def train(folder: Path, callbacks: list[Any], build: Any = gpt2, resume: Any = None, **options: Any) -> Trained:
    torch.manual_seed(0)
    model, metered = build(), Metered()
    data = examples(model)
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": BATCH, "report_to": "none",
            "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no", "seed": 3,
            "learning_rate": 1e-3, **options,
        }
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[*callbacks, metered])
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "autoremat", RuntimeWarning)
        trainer.train(resume_from_checkpoint=resume)
    return Trained(trainer, metered.meter.peaks, [str(w.message) for w in caught])


def assert_same(a: Trained, b: Trained) -> None:
    assert len(a.numbers) == len(b.numbers)
    for x, y in zip(a.numbers, b.numbers, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (bert, {"optim": "sgd", "max_grad_norm": 0.0}),
        (gpt2, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "eval_strategy": "steps", "eval_steps": 1}),
        (gpt2, {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}),
    ],
    ids=["bert", "accumulating", "bf16"],
)
def test_trainer_is_exact_and_within_the_budget(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", [], build, **options)
    callback = AutorematCallback(budget=0.7, time_limit_seconds=1)
    mine = train(tmp_path / "mine", [callback], build, **options)
    assert_same(mine, plain)
    stats = callback.stats()
    assert stats.reruns > 0
    assert stats.unplanned == 0
    assert stats.plan is not None
    # The first step is planned under way. The budget is of the last kind of step's plain peak, each kind has its own.
    assert 0 < max(mine.peaks[1:]) <= stats.plan.budget_bytes < max(plain.peaks[1:])
    assert session_of(mine.trainer.model) is None  # as it was


def test_saved_and_resumed(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", [], max_steps=4)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    callback = AutorematCallback(budget=0.7, time_limit_seconds=1)
    whole = train(tmp_path / "mine", [callback], **options)
    assert_same(whole, plain)
    resumed = train(tmp_path / "mine", [callback], resume=str(tmp_path / "mine" / "checkpoint-2"), **options)
    assert_same(resumed, plain)
    without = train(tmp_path / "mine", [], resume=str(tmp_path / "mine" / "checkpoint-2"), **options)
    assert_same(without, plain)
    assert callback.stats().calls == 2


def test_a_training_that_ended_in_an_error_can_be_begun_again(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *others: Any, **more: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    plain = train(tmp_path / "plain", [])
    callback = AutorematCallback(budget=0.7, time_limit_seconds=1)
    torch.manual_seed(0)
    model = gpt2()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    arguments = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 3}
    arguments |= {"max_steps": 4, "per_device_train_batch_size": BATCH, "logging_steps": 1, "learning_rate": 1e-3}
    data = examples(model)
    broken = Trainer(
        model, TrainingArguments(str(tmp_path), **arguments), train_dataset=data, callbacks=[callback, Breaks()]
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    model.load_state_dict(before)
    torch.manual_seed(0)
    gpt2()
    again = Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=data, callbacks=[callback])
    again.train()
    assert [e.get("loss") for e in again.state.log_history] == [e.get("loss") for e in plain.trainer.state.log_history]
    assert session_of(model) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_models_own_checkpointing_is_told_and_left_alone(reentrant: bool, tmp_path: Path) -> None:
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain = train(tmp_path / "plain", [], **options)
    callback = AutorematCallback(budget=1.0, time_limit_seconds=1)
    mine = train(tmp_path / "mine", [callback], **options)
    assert_same(mine, plain)
    assert sum("own checkpointing is switched on" in m for m in mine.messages) == 1
    assert "activation_checkpointing_disable()" in mine.messages[0]
    plan = callback.stats().plan
    assert plan is not None
    assert max(mine.peaks[1:]) <= plan.budget_bytes


def test_a_model_that_was_checkpointed_before(tmp_path: Path) -> None:
    """Accelerate wraps the forward once more, for bf16; autoremat still knows its own."""
    plain = train(tmp_path / "plain", [], bf16=True)
    mine = train(
        tmp_path / "mine", [], lambda: autoremat.checkpoint(gpt2(), budget=0.7, time_limit_seconds=1), bf16=True
    )
    assert_same(mine, plain)
    assert autoremat.stats(mine.trainer.model).reruns > 0
    with pytest.raises(ValueError, match="wrapped once more since"):
        autoremat.restore(mine.trainer.model)
    callback = AutorematCallback(budget=0.7, time_limit_seconds=1)
    with pytest.raises(ValueError, match="checkpointed by autoremat already"):
        train(tmp_path / "twice", [callback], lambda: autoremat.checkpoint(gpt2(), budget=0.7, time_limit_seconds=1))


# The compiler imports what torch calls deprecated, and looks at the gradient of every tensor.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_says_so(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    plain = train(tmp_path / "plain", [], **options)
    torch._dynamo.reset()
    callback = AutorematCallback(budget=0.7, time_limit_seconds=1)
    mine = train(tmp_path / "mine", [callback], **options)
    torch._dynamo.reset()
    assert_same(mine, plain)
    assert any("inside torch.compile: running without checkpointing" in m for m in mine.messages)
    assert callback.stats().calls == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("is_before", [False, True])
def test_a_compiled_model_is_planned_in_either_order(is_before: bool, tmp_path: Path) -> None:
    """Where the library does not say in the middle of the forward which loss it takes: that breaks the graph."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2}

    def in_one_graph() -> Any:
        model = gpt2()
        model.loss_type = "ForCausalLM"
        return model

    def checkpointed() -> Any:
        return autoremat.checkpoint(in_one_graph(), budget=0.8, time_limit_seconds=1)

    plain = train(tmp_path / "plain", [], in_one_graph, **options)
    torch._dynamo.reset()
    callback = AutorematCallback(budget=0.8, time_limit_seconds=1)
    build = checkpointed if is_before else in_one_graph
    mine = train(tmp_path / "mine", [] if is_before else [callback], build, **options)
    torch._dynamo.reset()
    assert_same(mine, plain)
    stats = autoremat.stats(mine.trainer.model) if is_before else callback.stats()
    assert (stats.executed_by, stats.fallbacks) == ("aot_eager", 0)
    assert stats.reruns > 0


def test_a_malformed_budget_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="budget"):
        AutorematCallback(budget="10 potatoes")
    with pytest.raises(ValueError, match="no training has begun"):
        AutorematCallback(budget=0.5).stats()
