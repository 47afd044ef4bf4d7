"""What autograd saves in place of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autoremat.engines.torch.eager.arguments import Seen, modified, version_of
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import local_of

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.backward import Backward


class Kept:
    """A saved tensor itself; with the number of its pack where the plan does something when it is asked for.

    It may turn into a handle, should the plan not hold for the step.
    """

    __slots__ = ("__weakref__", "backward", "handle", "pack", "tensor", "version")

    def __init__(self, tensor: Tensor, backward: Backward | None = None, pack: int = -1) -> None:
        self.tensor = tensor if is_leaf(tensor) else tensor.detach()
        self.version = version_of(self.tensor)
        self.backward, self.pack = backward, pack
        self.handle: Handle | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has modified the tensor in place since."""
        return version_of(self.tensor) == self.version

    def turn(self, handle: Handle) -> None:
        """Let a handle stand for the tensor from now on."""
        self.handle, self.backward = handle, None
        self.tensor = _EMPTY.setdefault((torch.float32, torch.device("cpu")), torch.empty(0))
        self.version = version_of(self.tensor)

    def get(self) -> Tensor:
        """The tensor; raises what autograd would raise if it has been modified in place since."""
        if not self.is_unchanged:
            raise modified(self.tensor, self.version)
        return self.tensor


class Handle:
    """Stands for a saved tensor whose memory may go: which value, seen how.

    Its probe shares the version counter with the tensor, and no memory, so it is noticed when somebody overwrites that.
    """

    __slots__ = ("backward", "pack", "probe", "seen", "served", "stays", "value", "version")

    def __init__(self, backward: Backward, pack: int, tensor: Tensor) -> None:
        self.backward, self.pack, self.value = backward, pack, _NOT_KNOWN
        self.seen = Seen.of(tensor)
        local = local_of(tensor)
        self.version = version_of(local)
        self.probe = _without_memory(local)
        self.stays: Tensor | None = None
        """What a node has been given, until it is through; one written in Python may ask once more."""
        self.served = 0
        """The backward pass, counted by the tape, in which it was served last."""

    def check_unchanged(self) -> None:
        """Raise what autograd would raise if the saved tensor has been modified in place."""
        if self.probe is not None and self.probe._version != self.version:
            view = self.seen.view
            raise modified(torch.empty_strided(view.size, view.stride, dtype=view.dtype, device="meta"), self.version)

    def __del__(self) -> None:
        if self.value != _NOT_KNOWN:
            self.backward.released(self)


_NOT_KNOWN = -(1 << 62)
_EMPTY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _without_memory(tensor: Tensor) -> Tensor | None:
    """An alias that has the version counter, and no memory; a fake tensor has none as it is."""
    if tensor.is_inference() or isinstance(tensor, FakeTensor):
        return None
    alias = tensor.detach()
    key = alias.dtype, alias.device
    if key not in _EMPTY:
        _EMPTY[key] = torch.empty(0, dtype=alias.dtype, device=alias.device)
    alias.data = _EMPTY[key]
    return alias
