"""The first step of a kind of input: for real, within the budget, with a shadow that records it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.check import NoCheck
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.recording import know_the_world, path_of, program_of, record_backward
from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.engines.torch.eager.tape import Reports, Tape
from autoremat.program import Program
from autoremat.record.parallel import Parallel
from autoremat.record.record import ModulePaths, NothingDifferentiable
from autoremat.record.timing import Progress
from autoremat.record.values import storage_of
from autoremat.record.world import named_tensors, reachable_modules


class NotRecorded(Exception):
    """The step could not be recorded; the message says why."""


class FirstStep:
    """One call of the callable, noted and recorded.

    Args:
        fn: the callable.
        args: its positional arguments.
        kwargs: its keyword arguments.
        parallel: what torch.distributed does around the modules.
        room: given the bytes that are there for good, what the values held may take, given what plain training holds.
        reports: whom the tape tells what.
        check: of what is made again.
    """

    def __init__(
        self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], parallel: Parallel,
        room: Callable[[int], Callable[[int], float]], reports: Reports, check: NoCheck,
    ) -> None:  # fmt: skip
        self.fn, self.args, self.kwargs, self.parallel = fn, args, kwargs, parallel
        self.modules = reachable_modules(fn, args, kwargs)
        self._failure: BaseException | None = None
        reports.unlike = self._failed
        self._paths = ModulePaths(self.modules)
        self._shadow = Shadow(self._paths.current)
        storages = self._storages()
        fixed_bytes = sum(s.nbytes() for s in storages.values())
        outside = frozenset(storages)
        self.tape = Tape(
            None, room=room(fixed_bytes), shadow=self._shadow, outside=outside, reports=reports, check=check
        )  # fmt: skip

    def _failed(self, error: BaseException) -> None:
        self._failure = self._failure or error

    def _storages(self) -> dict[int, torch.UntypedStorage]:
        """The memory that is there before the step."""
        tensors = [t for _, _, t in named_tensors(self.modules) if not torch.nn.parameter.is_lazy(t)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        tensors += [t for t in torch.utils._pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        storages = map(storage_of, tensors)
        return {s._cdata: s for s in storages if s is not None}

    def forward(self) -> Any:
        """Call the callable."""
        try:
            know_the_world(self._shadow, self.modules, self.args, self.kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot stand for
            self.tape.shadow = None
            self._failed(error)
        with self._paths, self.tape.forward():
            return self.fn(*self.args, **self.kwargs)

    def backward(self, result: Any) -> None:
        """Record the backward on fake tensors.

        Raises:
            NotRecorded: the forward, or the backward, cannot be made on fake tensors.
            NothingDifferentiable: nothing returned requires grad.
        """
        try:
            if self._failure is not None:
                raise self._failure
            record_backward(self._shadow, result, self.modules)
        except NothingDifferentiable:
            raise
        except Exception as error:
            raise NotRecorded(f"{type(error).__name__}: {error}") from error

    def program(
        self, *, optimizer_state_bytes: int, optimizer_scratch_bytes: int, progress: Progress | None,
        limit: Callable[[Program], int] | None,
    ) -> Program:  # fmt: skip
        """The program of the step."""
        return program_of(
            self._shadow, getattr(self.fn, "__name__", type(self.fn).__name__),
            optimizer_state_bytes=optimizer_state_bytes, optimizer_scratch_bytes=optimizer_scratch_bytes,
            parallel=self.parallel, progress=progress, limit=limit,
        )  # fmt: skip

    def path(self) -> Path:
        """The path of its forward."""
        assert self.tape.path is not None
        path = path_of(self._shadow, self.tape.path, self.tape.n_packs)
        self.tape.shadow = None
        return path
