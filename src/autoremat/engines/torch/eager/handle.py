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
    """A saved tensor itself.

    It has the number of its pack where the plan acts when the tensor is asked for. It may turn into a handle, should
    the plan not hold for the step.
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
        """Return the tensor; raise autograd's error if it was modified in place."""
        if not self.is_unchanged:
            raise modified(self.tensor, self.version)
        return self.tensor


class Handle:
    """Stands for a saved tensor whose memory may go.

    It knows which value the tensor looks at, and how. Its probe shares the version counter with the tensor, but no
    memory, so it notices when somebody overwrites the tensor.
    """

    __slots__ = ("backward", "pack", "probe", "seen", "served", "stays", "value", "version")

    def __init__(self, backward: Backward, pack: int, tensor: Tensor) -> None:
        self.backward, self.pack, self.value = backward, pack, _NOT_KNOWN
        self.seen = Seen.of(tensor)
        local = local_of(tensor)
        if local.is_inference():
            self.version, self.probe = 0, None
        else:
            self.version, self.probe = local._version, _without_memory(local)
        self.stays: Tensor | None = None
        """What the running node was given, until it is done.

        A node written in Python may ask once more.
        """
        self.served = 0
        """The number of the pass that served the handle last."""

    def check_unchanged(self) -> None:
        """Raise autograd's error if the saved tensor was modified in place."""
        if self.probe is not None and self.probe._version != self.version:
            view = self.seen.view
            raise modified(torch.empty_strided(view.size, view.stride, dtype=view.dtype, device="meta"), self.version)

    def __del__(self) -> None:
        if self.value != _NOT_KNOWN:
            self.backward.released(self)


_NOT_KNOWN = -(1 << 62)
_EMPTY: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _without_memory(tensor: Tensor) -> Tensor | None:
    """Make an alias with the version counter, but without memory.

    None for fake tensors.
    """
    if type(tensor) is not Tensor and isinstance(tensor, FakeTensor):
        return None
    alias = tensor.detach()
    key = alias.dtype, alias.device
    empty = _EMPTY.get(key)
    if empty is None:
        empty = _EMPTY[key] = torch.empty(0, dtype=alias.dtype, device=alias.device)
    alias.data = empty
    return alias
