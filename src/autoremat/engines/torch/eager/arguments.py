"""Turns arguments into templates without memory, and back into arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import PLAIN, Description, Jagged, description_of, has_inside, local_of
from autoremat.engines.torch.operators.values import View, storage_of

_new_tuple: Any = tuple.__new__
"""Builds a named tuple in a third of the usual time."""
_CONTAINERS = (tuple, list, dict, set, frozenset)
AS_THEY_ARE: Final = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size))
"""Types of arguments that are their own templates."""


class Seen(NamedTuple):
    """How a tensor looks at a value.

    It tells which part of the memory, and what is around it (a DTensor).
    """

    view: View
    description: Description | Jagged | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.view.size.numel() * self.view.dtype.itemsize

    @staticmethod
    def of(tensor: Tensor) -> Seen:
        """Describe how this tensor looks at its memory."""
        if type(tensor) in PLAIN:
            return _new_tuple(Seen, (View.of(tensor), None))
        if has_inside(tensor):
            return Seen(View.of(local_of(tensor)), description_of(tensor))
        return Seen(View.of(local_of(tensor)))

    def on(self, memory: Tensor) -> Tensor:
        """Make a tensor that looks this way at another tensor's memory.

        It has no history, and a version counter of its own.
        """
        view = self.view
        tensor = memory.detach() if view.is_of(memory) else view.on(memory.untyped_storage())
        return tensor if self.description is None else self.description.around(tensor)


class Made(NamedTuple):
    """An argument that looks at a value of the step."""

    value: int
    seen: Seen
    requires_grad: bool
    written: bool = False

    def tensor(self, memory: Mapping[int, Tensor]) -> Tensor:
        """Make the argument on the memory that holds its value now.

        One that is overwritten is no leaf.
        """
        tensor = self.seen.on(memory[self.value])
        if not self.requires_grad:
            return tensor
        return _inner(tensor) if self.written else requiring_grad(tensor)


class Outside:
    """An argument or saved tensor from outside the step, or its alias.

    Parameters and inputs are examples. Where a parameter is given other memory before the backward, as by
    ``parameter.data = ...``, a rerun reads what the first run has read.
    """

    __slots__ = ("memory", "requires_grad", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.requires_grad = tensor.requires_grad
        self.tensor = tensor if is_leaf(tensor) else tensor.detach()
        self.version = version_of(self.tensor)
        self.memory = tensor.detach() if self.tensor is tensor and type(tensor) in PLAIN else None

    def get(self) -> Tensor:
        """Return the tensor; raise autograd's error if it was modified in place."""
        if version_of(self.tensor) != self.version:
            raise modified(self.tensor, self.version)
        return self.tensor if self.memory is None or _have_one_memory(self.memory, self.tensor) else self.memory

    def argument(self) -> Tensor:
        """Return the tensor as an argument; it requires grad as before."""
        tensor = self.get()
        if is_freed(tensor):
            raise freed(tensor)
        return tensor if tensor.requires_grad or not self.requires_grad else requiring_grad(tensor.detach())


def _have_one_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()


class Statistics(Outside):
    """Running statistics: a rerun updates a copy of them."""

    __slots__ = ()

    def argument(self) -> Tensor:
        """Return a copy, whose content decides nothing."""
        return self.tensor.detach().clone()


class _Inner(torch.autograd.Function):
    """Gives a tensor a history, so a differentiable result may overwrite it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, holder: list[Tensor]) -> Tensor:
        """Return the tensor in the holder."""
        return holder.pop()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return nothing: nobody goes backward here."""
        return None, None


def _inner(tensor: Tensor) -> Tensor:
    anchor = torch.empty(0, dtype=tensor.dtype, device=tensor.device, requires_grad=True)
    made: Tensor = _Inner.apply(anchor, [tensor])
    return made


def requiring_grad(tensor: Tensor) -> Tensor:
    """Let a tensor require grad from now on, and return it.

    torch allows this for inference tensors in inference mode alone (``Tensor.requires_grad_``, 2.13).
    """
    if not tensor.is_inference():
        return tensor.requires_grad_()
    with torch.inference_mode():
        return tensor.requires_grad_()


class Nest(NamedTuple):
    """A list, tuple or dict of arguments that contains tensors.

    It has what builds the container, and the content.
    """

    make: Callable[[list[Any]], Any]
    content: list[Any]


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors among arguments or results, in order.

    Sets are not searched, because they have no order.
    """
    if isinstance(tree, Tensor):
        return [tree]
    return list(_tensors(tree)) if isinstance(tree, _CONTAINERS) else []


def _tensors(tree: Any) -> Iterator[Tensor]:
    for item in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (tuple, list, dict)):
            yield from _tensors(item)


def tensors_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """List the tensors among the arguments of a call, in order."""
    found: list[Tensor] = []
    for item in (*args, *kwargs.values()) if kwargs else args:
        if type(item) in PLAIN or isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list, dict)):
            found += _tensors(item)
    return found


def mapped(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Change every tensor in nested arguments.

    An argument that contains no container or tensor is returned as it is.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: mapped(item, change) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return _like(tree)([mapped(item, change) for item in tree])
    return tree


def template(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """Replace every tensor by ``change(tensor)``, and containers by ``Nest``."""
    if type(tree) in PLAIN or isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        if not any(isinstance(v, (Tensor, list, tuple, dict)) for v in tree.values()):
            return tree
        keys = list(tree)
        return Nest(lambda content: dict(zip(keys, content, strict=True)), [template(v, change) for v in tree.values()])
    if isinstance(tree, (list, tuple)):
        if not any(isinstance(v, (Tensor, list, tuple, dict)) for v in tree):
            return tree
        return Nest(_like(tree), [template(v, change) for v in tree])
    return tree


def resolved(tree: Any, memory: Mapping[int, Tensor]) -> Any:
    """Return the argument that a template stands for."""
    kind = type(tree)
    if kind in AS_THEY_ARE:
        return tree
    if kind is Made:
        return tree.tensor(memory)
    if kind is Outside or kind is Statistics:
        return tree.argument()
    if kind is Nest:
        return tree.make([resolved(item, memory) for item in tree.content])
    return tree


def _like(sequence: Any) -> Callable[[list[Any]], Any]:
    """Return what builds a list or tuple of the same type."""
    kind = type(sequence)
    if hasattr(kind, "_fields"):
        return lambda items: kind(*items)
    if kind in (list, tuple, torch.Size):
        return kind
    return list if isinstance(sequence, list) else tuple


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor.

    Inference tensors have none; they never change under autograd.
    """
    return 0 if tensor.is_inference() else tensor._version


class ModifiedInPlace(RuntimeError):
    """Raised for a saved tensor modified in place, as autograd does."""


def modified(tensor: Tensor, expected: int) -> ModifiedInPlace:
    """Make the error for a tensor, in autograd's words."""
    return ModifiedInPlace(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {expected} instead. "
        "Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True)."
    )


def is_freed(tensor: Tensor) -> bool:
    """Tell whether a tensor's memory has been taken away, as FSDP2 does."""
    storage = storage_of(tensor)
    return storage is not None and tensor.numel() > 0 and storage.nbytes() == 0


def freed(tensor: Tensor) -> RuntimeError:
    """Make the error for a tensor whose memory has been taken away."""
    return RuntimeError(
        f"a call that autoremat makes again reads a tensor of size {list(tensor.shape)} whose memory has been freed "
        "(fully_shard frees parameters after the forward, and gathers them for the backward of the module): this part "
        "of the graph is reached outside the backward of the module; call fully_shard with "
        "reshard_after_forward=False, or undo autoremat.checkpoint with autoremat.restore"
    )
