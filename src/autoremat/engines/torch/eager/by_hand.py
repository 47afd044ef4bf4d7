"""Parts of a step that the user checkpoints with ``torch.utils.checkpoint``.

What is saved inside such a part is gone after the forward. torch reruns the part as soon as the backward asks for the
first of it, and then all of it is there. In a recording that is one op of the backward. What the part is given is saved
outside of it, as other saved tensors are, and asked for right before the rerun.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor

from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.values import View, is_parameter, storage_of
from autoremat.engines.torch.recording.packs import Packed
from autoremat.engines.torch.recording.recorder import Recorder
from autoremat.engines.torch.recording.recording import RecordedOp

_OF_TORCH: Final = "torch.utils.checkpoint"
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def is_given_to_a_region() -> bool:
    """Tell whether autograd saves, right now, what a part is given.

    torch then makes a saved tensor by itself, right in that file (``save_inputs``, 2.13).
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("autoremat."):
        frame = frame.f_back
    return frame.f_globals.get("__name__") == _OF_TORCH


class Regions:
    """The parts of one step.

    Attributes:
        given: what has been saved for the part that begins next.
    """

    def __init__(self) -> None:
        self.given: list[Packed] = []
        self._found: dict[Any, Region] = {}

    def now(self, recorder: Recorder) -> Region | None:
        """Return the part that runs now; None outside of all.

        torch marks a part by its own saved-tensor hooks (``_checkpoint_hook`` in ``torch/utils/checkpoint.py``, 2.13).
        """
        hooks = _top_hooks(True)
        if hooks is None or getattr(hooks[0], "__module__", "") != _OF_TORCH:
            return None
        if hooks[0] not in self._found:
            self._found[hooks[0]] = Region(recorder, tuple(self.given))
            self.given.clear()
        return self._found[hooks[0]]


class Region:
    """One part, and what is saved in it.

    Args:
        recorder: that records the step.
        saved: what the part is given, as it has been saved.
    """

    def __init__(self, recorder: Recorder, saved: Sequence[Packed]) -> None:
        self.recorder, self._saved = recorder, saved
        self._waiting: WeakSet[SetAside] = WeakSet()
        self._begin = recorder.map.made
        self._reads: dict[int, None] = {}

    def given(self, numbers: Iterable[int]) -> None:
        """Note what a call reads: earlier values are read at the rerun."""
        self._reads.update((n, None) for n in numbers if 0 <= n < self._begin)

    def pack(self, tensor: Tensor) -> Any:
        """Return a stand-in for a saved tensor, without its memory.

        A tensor from outside stands for itself.
        """
        recorder, storage = self.recorder, storage_of(tensor)
        if storage is None or is_parameter(tensor) or recorder.map.number(storage) < 0:
            return tensor if is_leaf(tensor) else tensor.detach()
        number = recorder.map.number(storage)
        packed = SetAside(self, number, View.of(tensor), tensor.device, recorder.module_path(), self._saved)
        self._waiting.add(packed)
        return packed

    def rerun(self) -> None:
        """Make all saved tensors that are still waited for."""
        recorder = self.recorder
        waiting = [p for p in self._waiting if p.tensor is None]
        made: dict[int, Tensor] = {}
        with recorder.paused():
            for p in waiting:
                if p.number not in made:
                    made[p.number] = torch.empty(recorder.values[p.number].nbytes, dtype=torch.uint8, device=p.device)
        for given in self._saved:
            recorder.packs.ask(given)
        self._saved = ()  # from here on it is there as long as what is waiting
        inside = [n for n in made if n >= self._begin]
        op = RecordedOp(_OF_TORCH, list(self._reads), (), (), True, None, module=min(p.module for p in waiting))
        op.writes = tuple(recorder.map.bind_made(made[n].untyped_storage()) for n in inside)
        recorder.log.append(op)
        for new, n in zip(op.writes, inside, strict=True):
            recorder.storages.born(new, made[n], op)
        for n in made.keys() - inside:
            recorder.storages.hold(made[n].untyped_storage(), n)
        for packed in waiting:
            packed.tensor = made[packed.number]


@dataclass(eq=False)
class SetAside:
    """Stands for a tensor that torch recomputes."""

    region: Region
    number: int
    view: View
    device: torch.device
    module: str
    saved: Sequence[Packed]
    """What its part is given; torch has it as long as anything that it recomputes."""
    tensor: Tensor | None = None
    """Its memory, between the rerun of the part and the request."""

    def unpack(self) -> Tensor:
        """Hand out the tensor's memory, after a rerun of its part."""
        if self.tensor is None:
            self.region.rerun()
        assert self.tensor is not None
        memory, self.tensor, view = self.tensor, None, self.view
        with self.region.recorder.paused():
            whole = memory[: memory.numel() // view.dtype.itemsize * view.dtype.itemsize]
            tensor = whole.view(view.dtype).as_strided(view.size, view.stride, view.offset)
            tensor = torch._conj(tensor) if view.conjugated else tensor
            return torch._neg_view(tensor) if view.negated else tensor
