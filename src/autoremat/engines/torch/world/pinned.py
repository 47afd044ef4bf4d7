"""A slower tier for CUDA: pinned memory of the host.

Written, not yet run on a device.

Copies out run on one stream, copies back on another one. A copy begins once what the current stream has been told so
far is done, and whoever waits has the *current* stream wait for the copy's event: then memory that is freed afterwards
is used again on that stream after the copy only, so nothing has to be recorded with the allocator. Streams are asked
for when they are used, never remembered from before. Every value of a step has a place of its own, and a buffer is used
by a later step once both streams are through with this one.
"""

from __future__ import annotations

import statistics
import time
import weakref
from typing import Any, Final

import torch

from autoremat.engines.torch.world.tier import OffloadFailed
from autoremat.program import Link
from autoremat.program.units import format_bytes

_SAMPLE_BYTES, _SAMPLES = 64 << 20, 3
"""What the bandwidth is measured with."""
_ALIGNED: Final = 512
"""Bytes; places begin at multiples of it."""


class Copy:
    """One copy between device and host.

    Attributes:
        offset: of the value's place in the buffer.
        event: recorded behind the copy.
        memory: of the device; held until somebody has waited.
    """

    __slots__ = ("event", "memory", "offset")

    def __init__(self, offset: int, event: Any, memory: torch.Tensor) -> None:
        self.offset, self.event, self.memory = offset, event, memory


class Store:
    """What one step has in pinned memory.

    Args:
        tier: that it is a part of.
        buffer: of this step alone.
        streams: for copies out and back.
    """

    def __init__(self, tier: Pinned, buffer: torch.Tensor, streams: tuple[Any, Any]) -> None:
        self._tier, self._buffer, self._streams = tier, buffer, streams
        self.used_bytes = 0

    def has_room(self, nbytes: int) -> bool:
        """Tell whether the buffer has a place for so many bytes."""
        return self.used_bytes + nbytes <= self._buffer.numel()

    def send(self, storage: torch.UntypedStorage) -> Copy:
        """Begin to copy device memory to its own place."""
        offset, nbytes = self.used_bytes, storage.nbytes()
        self.used_bytes += -(-nbytes // _ALIGNED) * _ALIGNED
        return self._begun(self._streams[0], offset, storage, is_out=True)

    def fetch(self, sent: Copy, storage: torch.UntypedStorage) -> Copy:
        """Begin to copy it back, behind this value's copy out."""
        self._streams[1].wait_event(sent.event)
        return self._begun(self._streams[1], sent.offset, storage, is_out=False)

    def _begun(self, stream: Any, offset: int, storage: torch.UntypedStorage, *, is_out: bool) -> Copy:
        memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        place = self._buffer[offset : offset + storage.nbytes()]
        stream.wait_stream(torch.cuda.current_stream(storage.device))
        with torch.cuda.stream(stream):
            source, target = (memory, place) if is_out else (place, memory)
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return Copy(offset, event, memory)

    def wait(self, copy: Copy) -> BaseException | None:
        """Have the current stream wait for a copy."""
        torch.cuda.current_stream(copy.memory.device).wait_event(copy.event)
        del copy.memory
        return None

    def close(self) -> None:
        """Give the buffer back; its next user waits for both streams."""
        self._tier.take_back(self._buffer)
        self.used_bytes = 0


class Pinned:
    """Pinned memory of the host as a tier.

    Args:
        most_bytes: of all steps together; None where nobody limits them.

    Raises:
        OffloadFailed: there is no CUDA device.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise OffloadFailed('offload="host" is for tensors of a CUDA device, and there is none')
        self.most_bytes = most_bytes
        self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        self._buffers: list[torch.Tensor] = []
        self._stores: weakref.WeakSet[Store] = weakref.WeakSet()

    def open(self, nbytes: int) -> Store:
        """Pin as much memory as a step will use, or reuse some.

        Raises:
            OffloadFailed: it is more than the tier's budget leaves.
        """
        wanted = nbytes + nbytes // 64 + (1 << 20)  # places are aligned
        used = sum(store.used_bytes for store in list(self._stores))
        if self.most_bytes is not None and used + nbytes > self.most_bytes:
            raise OffloadFailed(
                f"a step moves {format_bytes(nbytes)} to the host, where others have {format_bytes(used)} of the "
                f"{format_bytes(self.most_bytes)} of offload_budget"
            )
        buffer = next((b for b in self._buffers if b.numel() >= wanted), None)
        if buffer is None:
            buffer = torch.empty(wanted, dtype=torch.uint8, pin_memory=True)
        else:
            self._buffers.remove(buffer)
            self._streams[0].wait_stream(self._streams[1])  # copies back of the step before read the same places
        store = Store(self, buffer, self._streams)
        self._stores.add(store)
        return store

    def take_back(self, buffer: torch.Tensor) -> None:
        """Have a buffer for the next step."""
        if len(self._buffers) < 2:
            self._buffers.append(buffer)

    def link(self) -> Link:
        """Measure the bandwidth, both ways at once."""
        memory = torch.empty(2, _SAMPLE_BYTES, dtype=torch.uint8, device="cuda")
        store, rates = self.open(2 * _SAMPLE_BYTES), list[float]()
        first = store.send(memory[0].clone().untyped_storage())
        torch.cuda.synchronize()
        for _ in range(_SAMPLES):
            store.used_bytes = _SAMPLE_BYTES
            begin = time.perf_counter()
            store.send(memory[1].clone().untyped_storage())
            store.fetch(first, memory[0].clone().untyped_storage())
            torch.cuda.synchronize()
            rates.append(_SAMPLE_BYTES / (time.perf_counter() - begin))
        store.close()
        rate = statistics.median(rates)
        return Link(rate, rate, 2e-5, takes_turns=False, tier_bytes=self.most_bytes, name="host")
