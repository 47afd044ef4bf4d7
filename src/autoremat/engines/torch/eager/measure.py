"""Measures the peak of one training step while the user trains.

Nothing here wraps the training loop, so the account begins with the call of the checkpointed callable and ends by
itself: at the first step of an optimizer after the backward has begun, or else at the next call. On CPU it is that of
``world.memory_account``, by torch's profiler, and slow; on CUDA it is the caching allocator's statistics.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from autoremat.engines.torch.operators.history import node_of
from autoremat.engines.torch.world.memory_account import account_of

_NO_TASK = -1


class Meter(Protocol):
    """Watches the allocator from its creation until it is stopped."""

    def stop(self) -> int | None:
        """Return the most bytes above the beginning; None if unknown."""


class ProfilerMeter:
    """Watches the CPU allocator by torch's profiler.

    There is one at a time, in the main thread.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> int | None:
        """Stop the profiler and add up what it saw."""
        self._profile.stop()
        return account_of(self._profile, 0).peak_bytes


class CudaMeter:
    """Reads the caching allocator's high-water mark of one device.

    Without ``reset`` it tells only what rises above the old mark.
    """

    def __init__(self, device: torch.device, *, reset: bool) -> None:
        self._device = device
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        self._before = torch.cuda.memory_allocated(device)
        self._mark = torch.cuda.max_memory_allocated(device)

    def stop(self) -> int | None:
        """Return how far the mark rose above the beginning, if it rose."""
        mark = torch.cuda.max_memory_allocated(self._device)
        return mark - self._before if mark > self._mark else None


def meter_for(tensors: Iterable[Tensor], *, asked: bool) -> Meter | None:
    """Return what measures a step on these tensors; None without any.

    ``asked``: the user wants the figure, at the price of a slow step on CPU and of the peak statistics on CUDA.
    """
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is not None:
        return CudaMeter(device, reset=asked)
    # torch runs one profiler at a time (``torch/autograd/profiler.py``, 2.13). It belongs to a thread, and must have
    # ended when its thread does.
    free = threading.current_thread() is threading.main_thread() and not torch.autograd._profiler_enabled()
    return ProfilerMeter() if asked and free else None


class Measurement:
    """The account of one step.

    Args:
        meter: watches the allocator.
        with_optimizer: whether the optimizer's step belongs to it.
        on_end: called with the bytes above those at the beginning.
    """

    def __init__(self, meter: Meter, with_optimizer: bool, on_end: Callable[[int], None]) -> None:
        self._meter, self._on_end, self._thread = meter, on_end, threading.get_ident()
        self._running, self._begun = True, False
        register = register_optimizer_step_post_hook if with_optimizer else register_optimizer_step_pre_hook
        self._hooks: list[Any] = [register(lambda *_: self.end() if self._begun else None)]
        atexit.register(self.end)  # a profiler that is still on when the process ends would take it down

    def watch(self, result: Any) -> None:
        """End the forward; from its result, notice the backward's beginning."""
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and (node := node_of(leaf)) is not None:
                self._hooks.append(node.register_prehook(self._begin_backward))

    def _begin_backward(self, _: Any) -> None:
        self._begun = True

    def end(self) -> None:
        """Stop, except in another thread or in the middle of a backward.

        There a profiler cannot be stopped.
        """
        if not self._running or threading.get_ident() != self._thread:
            return
        if torch._C._current_graph_task_id() != _NO_TASK:
            return
        self._running = False
        atexit.unregister(self.end)
        above = self._meter.stop()
        if self._begun and above is not None:
            self._on_end(above)

    def close(self) -> bool:
        """Stop and remove the hooks; tell whether it has stopped.

        Not to be called from one of the hooks.
        """
        self.end()
        if not self._running:
            while self._hooks:
                self._hooks.pop().remove()
        return not self._running
