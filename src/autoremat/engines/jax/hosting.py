"""Host memory as a slower tier, where a backend has one apart from its own. Not yet run on a device.

An array that is away is in the memory space of the host, by JAX's own names for that; XLA makes the copies, and decides
when they begin.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import jax
import jax.numpy as jnp

from autoremat.engines.jax.recording import Recorded
from autoremat.program import Fetch, Gone, Link, Schedule
from autoremat.program.units import Budget

HOST: Final = "host"
_KIND: Final = "pinned_host"
_SAMPLE_BYTES, _SAMPLES = 64 << 20, 5


def link_of(offload: str | None, offload_budget: int | str | None) -> Link | None:
    """The link that a user asks for; None for none.

    Raises:
        ValueError: another name than ``host``, a budget that cannot be read or is for nothing, or a backend without
            host memory apart from its own.
    """
    if offload is None:
        if offload_budget is not None:
            raise ValueError('offload_budget is for offload="host", which is not given')
        return None
    if offload != HOST:
        raise ValueError(f'offload is None or "host" under JAX, not {offload!r}')
    backend = jax.default_backend()
    if backend == "cpu":
        raise ValueError(
            'offload="host" moves arrays from a device to the memory of the host, and on the CPU backend both are the '
            "same memory, so nothing would be saved: leave offload out"
        )
    if _KIND not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
        raise ValueError(f"the {backend} backend knows no memory of the kind {_KIND!r}: leave offload out")
    most = None if offload_budget is None else Budget.read(offload_budget).in_bytes(0) if offload_budget else 0
    out, back = _bandwidths()
    return Link(out, back, 1e-5, takes_turns=False, tier_bytes=most, name=HOST)


@cache
def _bandwidths() -> tuple[float, float]:
    """Bytes a second to the host and back, measured once."""
    rates, array = dict[str, list[float]](out=[], back=[]), jnp.zeros(_SAMPLE_BYTES, jnp.uint8)
    for _ in range(1 + _SAMPLES):
        begin = time.perf_counter()
        sent = jax.block_until_ready(to_host(array))
        middle = time.perf_counter()
        jax.block_until_ready(to_device(sent))
        rates["out"].append(_SAMPLE_BYTES / (middle - begin))
        rates["back"].append(_SAMPLE_BYTES / (time.perf_counter() - middle))
    return statistics.median(rates["out"][1:]), statistics.median(rates["back"][1:])


def to_host(array: Any) -> Any:
    """The array in the memory of the host."""
    return jax.device_put(array, jax.memory.Space.Host)


def to_device(array: Any) -> Any:
    """The array in the memory of the device."""
    return jax.device_put(array, jax.memory.Space.Device)


class Hosted:
    """Arrays that are away, by the number of their value.

    Args:
        recorded: the step.
        schedule: of its plan.
    """

    def __init__(self, recorded: Recorded, schedule: Schedule) -> None:
        self._value_of, self._moves = recorded.value_of, schedule.moves
        self.away: dict[int, Any] = {}

    def follow(self, p: int, memory: dict[int, Any]) -> None:
        """Send after the run before ``p`` what goes there, and have back ahead of it what comes."""
        self.send(p, memory)
        self.come(p, memory)

    def come(self, p: int, memory: dict[int, Any]) -> None:
        """Have back ahead of run ``p`` what comes."""
        for v in self._coming(p):
            memory[v] = to_device(self.away.pop(v))

    def send(self, p: int, memory: dict[int, Any]) -> None:
        """Send after the run before ``p`` what goes there."""
        for v in self._going(p):
            self.away[v] = to_host(memory.pop(v))

    def at(self, cut: int) -> frozenset[int]:
        """The values that are away once the runs before ``cut`` are over."""
        found = set[int]()
        for p in range(cut + 1):
            found.update(self._going(p))
            found.difference_update(self._coming(p) if p < cut else ())
        return frozenset(found)

    def _going(self, p: int) -> Iterator[int]:
        return (self._value_of[move.value] for move in self._moves[p][0] if isinstance(move, Gone))

    def _coming(self, p: int) -> Iterator[int]:
        return (self._value_of[move.value] for move in self._moves[p][1] if isinstance(move, Fetch))
