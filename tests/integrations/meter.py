"""The allocator's own account of everything between two moments of a training."""

from __future__ import annotations

import gc
from typing import Any

from torch.profiler import ProfilerActivity, profile

from autoremat.engines.torch.world.memory_account import _add_up, _events, resident

SCALARS = 64
"""Bytes of the numbers that live outside the callable: the loss divided, logged, and cloned to compare it later."""


class Meter:
    """Peaks of stretches of a training, as long as nothing is planned in them: that uses the profiler itself."""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self._profile: Any = None

    def start(self, *things: Any) -> None:
        """Begin a stretch; the things are resident already."""
        gc.collect()
        self._before = resident(*things)
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def stop(self) -> None:
        """End it."""
        self._profile.__exit__(None, None, None)
        self.peaks.append(_add_up(_events(self._profile), self._before).peak_bytes)
