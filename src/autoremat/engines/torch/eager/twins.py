"""The twins of a step's tensors, which live as long."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoremat.engines.torch.eager.arguments import requiring_grad
from autoremat.engines.torch.eager.twin_world import TwinWorld, Unlike, is_like, is_nested, is_opaque
from autoremat.engines.torch.operators.history import is_leaf, node_made
from autoremat.engines.torch.operators.local import (
    Jagged,
    distributed_like,
    has_inside,
    is_distributed,
    is_jagged,
    knows_ragged_sizes,
    local_of,
)
from autoremat.engines.torch.operators.values import storage_of

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.twin_graph import TwinGraph


class Twins:
    """Twins by tensor, and by the memory that a tensor looks at.

    Args:
        world: in which they live.
    """

    graph: TwinGraph
    """Where their histories are; set by whoever makes it."""

    def __init__(self, world: TwinWorld) -> None:
        self._world = world
        self._twins: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._memory: dict[int, tuple[weakref.ref[torch.UntypedStorage], weakref.ref[Tensor]]] = {}
        """By address of real memory, the twin bound to it last."""
        self._gone: deque[int] = deque()

    def numbers(self) -> set[int]:
        """Collect the numbers of the values that twins look at."""
        bound = (storage_of(local_of(twin)) for _, twin in self._twins.values())
        return {self._world.recorder.map.number(s) for s in bound if s is not None}

    def tensors(self) -> list[Tensor]:
        """List the tensors of the step that are alive."""
        return [t for known, _ in self._twins.values() if (t := known()) is not None]

    def leaves(self) -> list[Tensor]:
        """List the twins that gradients are accumulated into."""
        found = {id(twin): twin for _, twin in self._twins.values() if is_leaf(twin) and twin.requires_grad}
        return list(found.values())

    def of(self, tensor: Tensor, node_of: Callable[[Tensor], Any] = node_made) -> Tensor:
        """Return a tensor's twin, made or corrected if need be.

        ``node_of``: gives the node that has made the tensor.
        """
        if (twin := self.known(tensor)) is not None:
            is_same = is_like(twin, tensor) and twin.requires_grad == tensor.requires_grad
            if is_same and not self._has_new_history(tensor, twin, node_of):
                return twin
            return self._put_right(tensor, twin)
        node = node_of(tensor)
        return self.bind(tensor, self._met(tensor, node), node)

    def _has_new_history(self, tensor: Tensor, twin: Tensor, node_of: Callable[[Tensor], Any]) -> bool:
        """Tell whether a tensor got a history unseen.

        Views that a custom Function returns get theirs when it ends; before, they say that they require grad, too.
        """
        if not is_leaf(twin) or is_leaf(tensor):
            return False
        node = node_of(tensor)
        return node is not None and not self.graph.is_placed(twin, (node._sequence_nr(), tensor.output_nr))

    def as_given(self, tensor: Tensor) -> Tensor:
        """Return the twin of an argument as it was when given."""
        twin = self.known(tensor)
        return self.of(tensor) if twin is None else twin

    def known(self, tensor: Tensor) -> Tensor | None:
        """Return the twin that a tensor already has, if any."""
        known = self._twins.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def forget(self, tensor: Tensor) -> None:
        """Forget a tensor's twin, which belongs to another value."""
        self._twins.pop(id(tensor), None)

    def bind(self, tensor: Tensor, twin: Tensor, node: Any) -> Tensor:
        """Make this a tensor's twin, and place it in the graph."""
        key, gone = id(tensor), self._gone
        before = self._twins.pop(key, None)
        if before is not None and before[0]() is None:  # another tensor, which is gone, had this address
            self.graph.cut(before[1])
        self._twins[key] = weakref.ref(tensor, lambda _: gone.append(key)), twin
        storage = storage_of(local_of(tensor))
        if storage is not None:
            self._memory[storage._cdata] = weakref.ref(storage), weakref.ref(twin)
        if node is not None:
            self.graph.place(twin, (node._sequence_nr(), tensor.output_nr))
        return twin

    def settle(self) -> None:
        """Free the memory of twins whose tensors are gone, not their graph."""
        while self._gone:
            known = self._twins.get(key := self._gone.popleft())
            if known is not None and known[0]() is None:
                del self._twins[key]
                self.graph.cut(known[1])

    def _met(self, tensor: Tensor, node: Any) -> Tensor:
        """Make the twin of a tensor that no call was seen making."""
        with self._world.here():
            if node is not None and (found := self.graph.of_node(tensor, node)) is not None:
                return found
            if is_jagged(tensor):
                knows_ragged_sizes(self._world.mode)
                inside = Jagged.of(tensor).converted(self.of)
                return inside.around(self.of(local_of(tensor)).detach()).requires_grad_(tensor.requires_grad)
            if is_distributed(tensor):
                return distributed_like(tensor, self._world.as_fake(local_of(tensor).detach()))
            if is_nested(tensor):
                blank = self.blank_like(tensor)
                return requiring_grad(blank) if tensor.requires_grad else blank
            storage = storage_of(local_of(tensor))  # known of what a custom function under no_grad returns
            twin = self.alias_of(tensor) if storage is not None and storage._cdata in self._memory else None
            if twin is None:
                twin = self._world.mode.from_tensor(local_of(tensor if is_leaf(tensor) else tensor.detach()))
            if tensor.requires_grad and not twin.requires_grad:
                twin = requiring_grad(twin)
            return twin

    def memory_of(self, tensor: Tensor) -> Tensor:
        """Return a twin of what is being saved, perhaps without a history."""
        known = self.known(tensor)
        if known is not None and is_like(known, tensor):
            return known
        storage = storage_of(tensor)
        if node_made(tensor) is None or storage is None or has_inside(tensor) or is_distributed(tensor):
            return self.of(tensor)
        with self._world.here():
            alias = self.alias_of(tensor)
            twin = self.blank_like(tensor) if alias is None else alias
        if alias is None:
            self._memory[storage._cdata] = weakref.ref(storage), weakref.ref(twin)
        return twin

    def know_no_gradients(self) -> None:
        """Before a pass, clear twins' gradients where real leaves have none."""
        for reference, twin in list(self._twins.values()):
            tensor = reference()
            if tensor is not None and is_leaf(tensor) and tensor.requires_grad and tensor.grad is None:
                twin.grad = None

    def _put_right(self, tensor: Tensor, twin: Tensor) -> Tensor:
        """Correct the twin of a tensor whose shape or history changed unseen."""
        node = node_made(tensor)
        with self._world.here():
            if not is_like(twin, tensor):
                return self.bind(tensor, self._met(tensor, node), node)
            if node is None:
                if not is_leaf(twin):
                    twin = twin.detach()
                twin = requiring_grad(twin) if tensor.requires_grad else twin.requires_grad_(False)
                return self.bind(tensor, twin, None)
            if not tensor.requires_grad:
                return self.bind(tensor, twin.detach(), node)
            stand_in = self.graph.of_node(tensor, node)
            if stand_in is None:
                raise Unlike("a tensor got a history that nobody has seen")
            storage, old = storage_of(stand_in), storage_of(twin)
            if storage is not None and old is not None and storage._cdata != old._cdata:  # keep the memory as before
                with self._world.recorder.paused(), torch.no_grad():
                    stand_in.data = twin.detach()
            return self.bind(tensor, stand_in, node)

    def alias_of(self, tensor: Tensor) -> Tensor | None:
        """Make a fake tensor on the memory of a twin, if possible."""
        storage = storage_of(tensor if is_distributed(tensor) or is_jagged(tensor) else local_of(tensor))
        twin = None if storage is None else self._on(storage)
        if twin is None or twin.dtype is not tensor.dtype or has_inside(twin):
            return None
        return twin.detach().as_strided(tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _on(self, storage: torch.UntypedStorage) -> Tensor | None:
        """Find a twin that stands for this real memory."""
        real, own = self._memory.get(storage._cdata, _NONE)
        if real() is storage and (twin := own()) is not None:
            return twin
        there = ((t, twin) for known, twin in self._twins.values() if (t := known()) is not None)
        return next((twin for t, twin in there if storage_of(local_of(t)) is storage), None)

    def blank_like(self, tensor: Tensor) -> Tensor:
        """Make another fake tensor of the same kind."""
        if is_jagged(tensor):
            return Jagged.of(tensor).converted(self.of).around(self.blank_like(local_of(tensor)))
        if is_nested(tensor):
            return torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        if is_opaque(tensor) or is_distributed(tensor):
            return self._world.mode.from_tensor(tensor.detach())
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)

    def close(self) -> None:
        """Hold no tensor any more."""
        self._twins.clear()
        self._memory.clear()


def _nothing() -> None:
    return None


_NONE: Any = _nothing, _nothing
