"""The shadow's recorder, which knows sizes that real calls have shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from autoremat.engines.torch.operators.facts import OpFacts
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.recorder import Recorder


@dataclass
class Told(Recorder):
    """A recorder that knows the real sizes of data-dependent results.

    The real call has just shown them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.real: list[Tensor] = []
        self.given: list[tuple[Tensor, Tensor]] = []
        self.masks: list[tuple[torch.Size, int]] = []
        """Sizes of given masks and indices, with their numbers of nonzero elements."""
        self.counts: dict[int, int] = {}
        """By value, how many elements of a saved mask are true."""

    def count(self, mask: Tensor) -> None:
        """Note how many elements of a saved mask are true."""
        storage = storage_of(mask)
        if storage is None:
            return
        for size, n in self.masks:
            if size == mask.size():
                self.counts[self.map.number(storage)] = n

    def _run(self, func: Any, facts: OpFacts, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1]):
            made = self._sized(func, args)  # the fake kernel of a boolean index asks for numbers in its own way
            if made is not None:
                return made
        try:
            return super()._run(func, facts, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            made = self._sized(func, args)
            if made is None:
                raise
            return made

    def _sized(self, func: Any, args: Any) -> Any:
        """Make a data-dependent operator's results, sized as the real ones."""
        real = self.real
        if func is torch.ops.aten.nonzero.default:
            n = self._n_true(args[0])
            if n is not None:
                return torch.empty_strided((n, args[0].dim()), (1, n), dtype=torch.int64, device=args[0].device)
        if func is torch.ops.aten.index.Tensor and not real:
            return self._indexed(*args)
        returns = func._schema.returns
        if not real or len(returns) != len(real) or any(r.type.kind() != "TensorType" for r in returns):
            return None
        made = tuple(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device) for t in real)
        return made[0] if len(made) == 1 else made

    def _indexed(self, source: Tensor, indices: Any) -> Any:
        """Make what a mask alone picks, in the backward."""
        if len(indices) != 1 or (n := self._n_true(indices[0])) is None:
            return None
        return torch.empty((n, *source.shape[indices[0].dim() :]), dtype=source.dtype, device=source.device)

    def _n_true(self, mask: Tensor) -> int | None:
        for size, n in self.masks:
            if size == mask.size():
                return n
        storage = storage_of(mask)
        known = None if storage is None else self.counts.get(self.map.number(storage))
        return self.real[0].size(0) if known is None and self.real else known
