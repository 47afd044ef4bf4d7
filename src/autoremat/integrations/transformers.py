"""Hugging Face ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from autoremat.engines.torch.eager.stats import Stats
from autoremat.integrations.training import Training
from autoremat.planner.wishes import Patterns

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("autoremat.integrations.transformers needs transformers: pip install 'autoremat[transformers]'") \
        from error  # fmt: skip


class AutorematCallback(TrainerCallback):
    """Trains the model of a ``Trainer`` within a memory budget.

    The model is checkpointed when the training begins, with the trainer's optimizer in the account, and as it was when
    the training is over. Loss, parameters, saved checkpoints: bit for bit those of plain training. What a
    ``compute_loss_func`` or label smoothing takes beside the model is not in the account.

    Args:
        budget: the peak of a training step, as for ``autoremat.checkpoint``: ``"10GiB"``, a number of bytes, a fraction
            of the plain peak (``0.5``, ``"50%"``), or ``"auto"``.
        optimizer_state_bytes: the state of the trainer's optimizer, where autoremat cannot find that out.
        keep: as for ``autoremat.checkpoint``.
        recompute: as for ``autoremat.checkpoint``.
        time_limit_seconds: the longest that making a plan may take.

    Raises:
        ValueError: a malformed budget; when the training begins, a model that is checkpointed by autoremat already.
        InfeasibleBudget: at the first step, when no plan fits; names the smallest budget that does.

    Example:
        >>> import tempfile, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
        >>> data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 32))]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
        ...     callback = AutorematCallback(budget="90%")
        ...     _ = Trainer(model, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +ELLIPSIS
        {...
        >>> callback.stats().plan.peak_bytes <= callback.stats().plan.budget_bytes
        True
    """

    def __init__(
        self, budget: int | float | str, *, optimizer_state_bytes: int | None = None, keep: Patterns = (),
        recompute: Patterns = (), time_limit_seconds: float = 10.0,
    ) -> None:  # fmt: skip
        self._training = Training(budget, optimizer_state_bytes, keep, recompute, time_limit_seconds)

    def stats(self) -> Stats:
        """Return ``autoremat.stats`` of the running training, or of the last."""
        return self._training.stats()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **others: Any) -> None:
        """Checkpoint the model."""
        self._training.begin(model, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Leave the model as it was."""
        self._training.end()
