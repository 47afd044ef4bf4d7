"""The bytes of numpy's arrays, by Python's own account of allocations."""

from __future__ import annotations

import tracemalloc

import numpy as np


class Meter:
    """The bytes of arrays that are there, by Python's own account of allocations."""

    def __enter__(self) -> Meter:
        self.peak_bytes = 0
        tracemalloc.start()
        return self

    def __exit__(self, *error: object) -> None:
        tracemalloc.stop()

    def look(self) -> None:
        """Take note of what is there now, if anybody measures."""
        if not tracemalloc.is_tracing():
            return
        snapshot = tracemalloc.take_snapshot()
        arrays = snapshot.filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
        self.peak_bytes = max(self.peak_bytes, sum(trace.size for trace in arrays.traces))
