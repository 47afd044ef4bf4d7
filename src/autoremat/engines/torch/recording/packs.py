"""The saved tensors of a recording, without their data."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from autoremat.engines.torch.operators.values import View
from autoremat.engines.torch.recording.log import Log
from autoremat.engines.torch.recording.recording import RecordedOp
from autoremat.engines.torch.recording.storages import Storages


class Packed:
    """The metadata that the recorder keeps of a saved tensor; no data."""

    __slots__ = ("__weakref__", "device", "module", "n", "number", "source", "unpacked", "view")

    def __init__(self, n: int, number: int, view: View, device: torch.device, module: str, source: str) -> None:
        self.number, self.view, self.device, self.module, self.source = number, view, device, module, source
        self.n = n
        self.unpacked = False


class Packs:
    """Knows which values are saved, and which the backward has asked for.

    Args:
        log: has the values.
        storages: of the values.
    """

    def __init__(self, log: Log, storages: Storages) -> None:
        self._log, self._storages = log, storages
        self._n = 0
        self._packed: dict[int, weakref.ref[Packed]] = {}
        self._number_of: dict[int, int] = {}
        self._of_value: dict[int, set[int]] = {}
        self._open: dict[int, int] = {}
        """By pack, the op at which the backward has asked for it."""
        self._gone_at: dict[int, int] = {}
        """By pack, how many ops there were when the real step's graph let go of it."""

    def save(self, number: int, view: View, device: torch.device, module: str, source: str) -> Packed:
        """Note that autograd saves this view of a value."""
        packed = Packed(self._n, number, view, device, module, source)
        self._n += 1
        key = id(packed)
        n = packed.n
        self._packed[key] = weakref.ref(packed, lambda _: self._released(key, n))
        self._number_of[key] = number
        self._of_value.setdefault(number, set()).add(key)
        return packed

    def ask(self, packed: Packed) -> None:
        """Note that the backward asks for a saved tensor."""
        packed.unpacked = True
        self._log.append(
            RecordedOp("unpack", [packed.number], (), (), True, None, module=packed.module, source=packed.source,
                       packed=packed.n)
        )  # fmt: skip
        self._open[id(packed)] = len(self._log.ops) - 1

    def are_open(self) -> bool:
        """Tell whether a node of the backward holds what it asked for."""
        return bool(self._open)

    def is_saved(self, number: int) -> bool:
        """Tell whether a saved tensor stands for this value."""
        return bool(self._of_value.get(number))

    def move(self, in_place: Sequence[tuple[int, int]]) -> None:
        """Let what was saved stand for what its memory holds now.

        Overwriting a saved tensor is a user's error that shows in the backward; except where another part of the
        memory, with its own version counter, is overwritten (``unsafe_chunk``, ``tensor.data``).
        """
        for new, old in in_place:
            for key in self._of_value.pop(old, ()):
                packed = self._packed[key]()
                if packed is not None:
                    packed.number = new
                self._number_of[key] = new
                self._of_value.setdefault(new, set()).add(key)

    def gone(self, n: int) -> None:
        """Note that the real graph has let go of a pack.

        Nobody will ask for it, though the graph that stands for the real one may have it for longer.
        """
        self._gone_at.setdefault(n, len(self._log.ops))

    def _released(self, key: int, n: int) -> None:
        del self._packed[key]
        number = self._number_of.pop(key)
        self._of_value[number].discard(key)
        asked_at = self._open.pop(key, None)
        if asked_at is not None:  # its node is done, including sums over broadcast dimensions
            self._storages.is_used(number, asked_at)
        else:  # nobody asked for it: plain training would have kept it until now
            value = self._log.values[number]
            value.died = max(value.died or 0, self._gone_at.get(n, len(self._log.ops)))

    def finish(self) -> None:
        """Hold what nobody has asked for to the end of the step."""
        for ref in self._packed.values():
            packed = ref()
            if packed is not None and not packed.unpacked and packed.n not in self._gone_at:
                self._log.values[packed.number].forever = True
