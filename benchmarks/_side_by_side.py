"""Times of steps beside one another: they take turns, and none of them pays for another one's page faults.

glibc hands memory back to the system whenever much is free at the end of its heap, and gets it again a page at a time:
hundreds of milliseconds that fall on whichever step happens to come next, and more often on one that uses more memory.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

Step = Callable[[], Any]

WARM_UP = 2
"""Steps of each kind that are not timed."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_memory() -> None:
    """The C allocator never hands memory back, never maps a tensor by itself; without effect in other C libraries."""
    mallopt = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20)):
            mallopt(option, value)


def seconds_of(steps: Mapping[str, tuple[nn.Module, Step]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, its model's gradients cleared before, in another order each round."""
    return {name: [s for (s,) in found] for name, found in by_clocks(steps, rounds, [time.perf_counter]).items()}


def by_clocks(
    steps: Mapping[str, tuple[nn.Module, Step]], rounds: int, clocks: Sequence[Callable[[], float]]
) -> dict[str, list[tuple[float, ...]]]:
    """The same by several clocks at once."""
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0)
    for _ in range(WARM_UP + rounds):
        shuffle.shuffle(order)  # what one step leaves in the caches, the next one meets
        for name in order:
            model, step = steps[name]
            model.zero_grad()
            begin = [clock() for clock in clocks]
            step()
            samples[name].append(tuple(clock() - b for clock, b in zip(clocks, begin, strict=True)))
    return {name: s[WARM_UP:] for name, s in samples.items()}
