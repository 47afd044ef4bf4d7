"""What autograd saves of twins, matched with the real step's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.by_hand import Region, Regions, SetAside
from autoremat.engines.torch.eager.twin_world import TwinWorld, Unlike, is_small_index, with_twin
from autoremat.engines.torch.operators.local import PackedLocal, local_of
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.recording.packs import Packed


class TwinPacks:
    """Packs of twins, by the packs of the real step.

    Args:
        world: of the twins.
    """

    def __init__(self, world: TwinWorld) -> None:
        self.recorder = world.recorder
        self.pack_of: dict[int, int] = {}
        """By the recorder's count of packs, the real step's pack."""
        self._count_of: dict[int, int] = {}
        """The same the other way round."""
        self.number_of: dict[int, int] = {}
        """By real pack, its value's number, if the step made it."""
        self.here: dict[int, Tensor] = {}
        """What the running call has saved, by pack."""
        self.saved_after: dict[int, int] = {}
        """For every saved value, the op after which it was saved first."""
        self.packs: list[Any] = []
        """What the running call has saved of twins."""
        self._sizes: list[torch.Size] = []
        self._packed_once: set[int] = set()
        """Addresses of storages that the running call has saved."""
        self._numbers: dict[int, Tensor] = {}
        """Small saved indices with real numbers, by the recorder's pack count."""
        self._regions = Regions()
        self.region: Region | None = None
        """The part that the user checkpoints by hand, if inside one."""

    @property
    def real_bytes(self) -> int:
        """Add up the real numbers that the recording itself has copied."""
        return sum(numbers.nbytes for numbers in self._numbers.values())

    def find_region(self) -> Region | None:
        """Find the part checkpointed by hand in which the next call runs."""
        self.region = self._regions.now(self.recorder)
        return self.region

    def begin(self) -> None:
        """Begin a call: nothing has been saved in it."""
        self.packs, self._sizes, self._packed_once = [], [], set()

    def close(self) -> None:
        """Hold no tensor of the step any more."""
        self.here.clear()
        self._count_of.clear()
        self._numbers.clear()
        self._regions, self.region = Regions(), None

    def hooks(self) -> AbstractContextManager[Any]:
        """Open a block in which what autograd saves is packed here."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def give(self, j: int, twin: Tensor) -> None:
        """Note what the part checkpointed by hand that begins is given."""
        with self.outside_of_regions():
            packed = self._pack(twin)
        self.match(packed, j)
        packed = packed.packed if isinstance(packed, PackedLocal) else packed
        if isinstance(packed, Packed):
            self._regions.given.append(packed)
        self.begin()

    @contextmanager
    def outside_of_regions(self) -> Iterator[None]:
        """Open a block in which what is saved belongs to no region.

        What a custom function before the region has saved gets its twins when the region first reads its result.
        """
        region, self.region = self.region, None
        try:
            yield
        finally:
            self.region = region

    def _pack(self, tensor: Tensor) -> Any:
        if self.region is not None:
            return self.region.pack(tensor)
        if tensor.dtype is torch.bool:
            self.recorder.count(tensor)
        packed = self.recorder.pack(tensor)
        self.packs.append(packed)
        self._sizes.append(local_of(tensor).size())
        inner = packed.packed if isinstance(packed, PackedLocal) else packed
        storage = storage_of(local_of(tensor))
        if isinstance(inner, Packed) and storage is not None and storage._cdata not in self._packed_once:
            self._packed_once.add(storage._cdata)
            self.saved_after.setdefault(inner.number, len(self.recorder.ops) - 1)
        return packed

    def _unpack(self, packed: Any) -> Tensor:
        """Hand out memory for a saved tensor, with numbers where needed."""
        if isinstance(packed, SetAside):
            return packed.unpack()
        fake = self.recorder.unpack(packed)
        numbers = self._numbers.get(packed.n) if isinstance(packed, Packed) else None
        return fake if numbers is None else with_twin(numbers, fake)

    def match_all(self, func: Any, packs: Sequence[int]) -> None:
        """Match what was saved on fake tensors with the real packs.

        Fake tensor subclasses may have their parts saved as well: these are passed over.
        """
        if len(self.packs) == len(packs):
            matched = zip(self.packs, packs, strict=True)
        else:
            rest = iter(zip(self.packs, self._sizes, strict=True))
            sizes = {j: local_of(self.here[j]).size() for j in packs}
            found = [next((p for p, size in rest if size == sizes[j]), None) for j in packs]
            if any(p is None for p in found):
                saved = f"saves {len(self.packs)} tensors on fake ones and {len(packs)} on real ones"
                raise Unlike(f"{spoken_name(func)} {saved}")
            matched = zip(found, packs, strict=True)
        for packed, j in matched:
            self.match(packed, j)
        self.begin()  # what is still in the list would seem to be wanted to the end of the backward

    def asked(self, value: int) -> None:
        """Do nothing: a pass within the forward is recorded itself."""

    def gone(self, pack: int) -> None:
        """Note that the real graph has let go of a pack."""
        if (n := self._count_of.get(pack)) is not None:
            self.recorder.packs.gone(n)

    def match(self, packed: Any, j: int) -> None:
        """Match one pack of a twin with a real pack."""
        if isinstance(packed, PackedLocal):
            packed = packed.packed
        if isinstance(packed, Packed):
            self.pack_of[packed.n], self._count_of[j] = j, packed.n
            self.number_of[j] = packed.number
            real = self.here.get(j)
            if real is not None and real.dtype is not torch.bool and is_small_index(real):
                self._numbers[packed.n] = real.detach().clone()


def spoken_name(func: Any) -> str:
    """Name a function as its class or module does."""
    return str(getattr(func, "__qualname__", None) or getattr(func, "__name__", func))
