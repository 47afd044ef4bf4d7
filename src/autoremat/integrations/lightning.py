"""``lightning.Trainer``."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from autoremat.engines.torch.eager.stats import Stats
from autoremat.integrations.training import Training
from autoremat.planner.wishes import Patterns

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError("autoremat.integrations.lightning needs lightning: pip install 'autoremat[lightning]'") \
        from error  # fmt: skip


class AutorematCallback(Callback):
    """Trains a ``LightningModule`` within a memory budget.

    Its ``forward``, or what ``target`` names, is checkpointed when the training begins, with the trainer's optimizers
    in the account, and as it was when the training ends. Automatic and manual optimization, bit for bit as without.

    ``training_step`` itself cannot be the target: it gets the number of the batch, logs, and may run the backward. Let
    it call ``self(...)``, a submodule, or a method that returns the loss; with the last the loss is in the account too.

    Args:
        budget: the peak of a training step, as for ``autoremat.checkpoint``: ``"10GiB"``, a number of bytes, a fraction
            of the plain peak (``0.5``, ``"50%"``), or ``"auto"``.
        target: what ``training_step`` calls: ``"forward"``, the path of a submodule (``"model"``), or the name of a
            method (``"loss"``).
        optimizer_state_bytes: the state of the trainer's optimizers, where autoremat cannot find that out.
        keep: as for ``autoremat.checkpoint``.
        recompute: as for ``autoremat.checkpoint``.
        time_limit_seconds: the longest that making a plan may take.

    Raises:
        ValueError: a malformed budget; ``training_step`` as the target; when the training begins, a target that is
            checkpointed by autoremat already.
        AttributeError: when the training begins, a target that is not there.
        InfeasibleBudget: at the first step, when no plan fits; names the smallest budget that does.

    Warns:
        RuntimeWarning: after the first batch, if ``training_step`` has not called the target.

    Example:
        >>> import lightning, torch
        >>> class Net(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        ...     def loss(self, x):
        ...         return self.layers(x).square().mean()
        ...     def training_step(self, batch, batch_idx):
        ...         return self.loss(batch)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = AutorematCallback(budget="90%", target="loss")
        >>> callback.stats()
        Traceback (most recent call last):
        ...
        ValueError: no training has begun with this callback yet; ask again after that
    """

    def __init__(
        self, budget: int | float | str, target: str = "forward", *, optimizer_state_bytes: int | None = None,
        keep: Patterns = (), recompute: Patterns = (), time_limit_seconds: float = 10.0,
    ) -> None:  # fmt: skip
        if target == "training_step":
            raise ValueError(
                "training_step gets the number of the batch, logs, and may run the backward, so it cannot be planned "
                "as a whole; put the computation of the loss into a method of its own, and name that: target='loss'"
            )
        self._training = Training(budget, optimizer_state_bytes, keep, recompute, time_limit_seconds)
        self._name, self._undo, self._looked = target, lambda: None, False

    def stats(self) -> Stats:
        """Return ``autoremat.stats`` of the running training, or of the last."""
        return self._training.stats()

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Checkpoint the target."""
        self._end()
        target = pl_module if self._name == "forward" else operator.attrgetter(self._name)(pl_module)
        checkpointed = self._training.begin(target, list(trainer.optimizers))
        if not isinstance(target, nn.Module):
            self._undo = _put(pl_module, self._name, checkpointed)
        self._looked = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *others: Any) -> None:
        """Warn if the target is not what ``training_step`` calls."""
        if self._looked:
            return
        self._looked, stats = True, self.stats()
        if not stats.calls and not stats.unplanned:
            warnings.warn(
                f"autoremat: training_step of {type(pl_module).__name__} has not called {self._name!r}, so nothing is "
                "checkpointed; name the submodule or the method that it calls: AutorematCallback(budget, target=...)",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave everything as it was."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave everything as it was."""
        self._end()

    def _end(self) -> None:
        self._undo()
        self._undo = lambda: None
        self._training.end()


def _put(module: nn.Module, path: str, method: Any) -> Callable[[], None]:
    """Make this the method at the path; return what undoes it."""
    where, _, name = path.rpartition(".")
    owner = module.get_submodule(where)
    replaced = vars(owner).get(name)
    setattr(owner, name, method)

    def undo() -> None:
        delattr(owner, name)
        if replaced is not None:
            setattr(owner, name, replaced)

    return undo
