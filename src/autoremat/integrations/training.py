"""What all trainers' callbacks share: a training checkpointed from begin to end."""

from __future__ import annotations

from typing import Any

import autoremat
from autoremat.engines.torch.eager.stats import Stats
from autoremat.planner.wishes import Patterns


class Training:
    """Holds the arguments of ``autoremat.checkpoint`` while a training runs.

    It has what they are applied to, too.

    Args:
        budget: as for ``autoremat.checkpoint``; refused here and now if it is malformed.
        optimizer_state_bytes: the state of the trainer's optimizer, where autoremat cannot find that out.
        keep: as for ``autoremat.checkpoint``.
        recompute: as for ``autoremat.checkpoint``.
        time_limit_seconds: as for ``autoremat.checkpoint``.
    """

    def __init__(
        self, budget: int | float | str, optimizer_state_bytes: int | None, keep: Patterns, recompute: Patterns,
        time_limit_seconds: float,
    ) -> None:  # fmt: skip
        self._checkpoint: Any = autoremat.checkpoint(
            budget=budget, keep=keep, recompute=recompute, time_limit_seconds=time_limit_seconds
        )
        self._optimizer_state_bytes = optimizer_state_bytes
        self._target: Any = None
        self._stats: Stats | None = None

    def begin(self, target: Any, optimizer: Any) -> Any:
        """Checkpoint a module or a callable.

        What an earlier training has left behind is undone first.
        """
        self.end()
        known = self._optimizer_state_bytes
        self._stats = None
        self._target = self._checkpoint(target, optimizer=optimizer if known is None else known)
        return self._target

    def end(self) -> None:
        """Undo it, and remember the statistics."""
        if self._target is not None:
            self._stats = autoremat.stats(self._target)
            target, self._target = self._target, None
            autoremat.restore(target)

    def stats(self) -> Stats:
        """Statistics of the training that runs, or of the last one."""
        if self._target is not None:
            return autoremat.stats(self._target)
        if self._stats is None:
            raise ValueError("no training has begun with this callback yet; ask again after that")
        return self._stats
