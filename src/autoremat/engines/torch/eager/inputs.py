"""Tells which inputs are the same to a plan, and how large.

The *form* of an input is all that usually decides which calls a forward makes; its *sizes* decide how large their
results are. A plan made for one input serves every input of the same form none of whose sizes is larger.

Numbers that are no sizes, text and objects are in neither: where they decide which calls are made, the tape notices
another path, and where they decide how large something is, that it has grown.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoremat.engines.torch.operators.compiled import is_compiled
from autoremat.engines.torch.operators.history import is_leaf
from autoremat.engines.torch.operators.local import Jagged, is_jagged, local_of
from autoremat.engines.torch.world.modules import named_tensors, reachable_modules
from autoremat.engines.torch.world.parallel import parallel_of
from autoremat.engines.torch.world.parallel import signature as parallel_signature


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large an input is.

    Attributes:
        each: sizes of all its tensors, dimension by dimension; of inputs of one form as many.
        numbers: its whole numbers, which may be sizes of something.
        elements: of all its tensors together.
        gradients: for every parameter and buffer 1 where a gradient is there before the step, else 0.
    """

    each: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    elements: int = 0
    gradients: bytes = b""

    def fits_into(self, other: Sizes) -> bool:
        """Tell whether no size is larger than another input's of this form.

        Gradients do not count.
        """
        return self.elements <= other.elements and all(a <= b for a, b in zip(self._all, other._all, strict=True))

    def finds_within(self, found: bytes) -> bool:
        """Tell whether it finds no other gradients than these."""
        return self.gradients == found or not any(a and not b for a, b in zip_longest(self.gradients, found))

    def share_of(self, other: Sizes) -> float:
        """Return this input's elements as a share of a larger one's.

        An empty input counts as one element.
        """
        return max(1, self.elements) / max(1, other.elements)

    def without_numbers(self) -> Sizes:
        """Return the sizes of the tensors alone."""
        return replace(self, numbers=())

    def ratio(self, other: Sizes) -> float:
        """Return the least growth of a size from this input to another.

        It is 1 where no size has grown. This input must fit into the other.
        """
        grown = [b / a for a, b in zip(self._all, other._all, strict=True) if b > a > 0]
        return min(grown, default=1.0)

    def grown(self, since: Sizes, factor: float) -> Sizes:
        """Multiply the sizes that have grown since other sizes."""
        each = tuple(_larger(a, b, factor) for a, b in zip(since.each, self.each, strict=True))
        numbers = tuple(_larger(a, b, factor) for a, b in zip(since.numbers, self.numbers, strict=True))
        n_grown = sum(b > a for a, b in zip(since.each, self.each, strict=True))
        return Sizes(each, numbers, math.ceil(self.elements * factor**n_grown), self.gradients)

    def shrunk(self, since: Sizes, share: float) -> Sizes:
        """Multiply the sizes that have grown since others by less than 1."""
        return replace(self.grown(since, share), elements=math.ceil(self.elements * share))

    @property
    def _all(self) -> tuple[int, ...]:
        return (*self.each, *self.numbers)


class Form(NamedTuple):
    """The form of an input.

    Attributes:
        args: of the positional arguments.
        kwargs: names and forms of the others.
        flags: of every module, whether it trains and is compiled.
        own: of every parameter and buffer, whether it requires a gradient, its dtype and shape.
        autocast: devices and dtypes.
        around: what torch.distributed does around the modules.
    """

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    flags: tuple[Any, ...]
    own: tuple[Any, ...]
    autocast: tuple[Any, ...]
    around: Any


class TensorForm(NamedTuple):
    """The form of a tensor among the arguments.

    Attributes:
        dtype: of its elements.
        dimensions: in a list how many; else for each one 0, 1, or 2 for anything larger.
        order: how it lies in memory.
        device: where it is.
        requires_grad: whether it requires grad.
        grad: whether it has a gradient.
        placements: of a distributed one.
    """

    dtype: torch.dtype
    dimensions: Any
    order: Any
    device: torch.device
    requires_grad: bool
    grad: bool
    placements: Any


def _larger(before: int, now: int, factor: float) -> int:
    return math.ceil(now * factor) if now > before else now


def input_of(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Form, Sizes]:
    """Return form and sizes of an input. O(modules + tensors).

    The form has: how arguments are nested, lists of like items like one item, dataclasses like dicts; dtypes, devices,
    dimensions, the order of strides and ``requires_grad`` of tensors; flags; ``training`` of every module that the
    callable can reach, and which parameters require gradients; autocast. Which parameters have a gradient is among the
    sizes, for a plan with more gradients serves those with fewer; where ``torch.distributed`` moves gradients about, it
    is in the form.
    """
    sizes = _Found([], [], [])
    positional, named = tuple([_form(x, sizes) for x in args]), tuple([(k, _form(x, sizes)) for k, x in kwargs.items()])
    roots = reachable_modules(fn, args, kwargs)
    modules = _all_modules(roots)
    flags = tuple([(getattr(m, "training", False), is_compiled(m)) for m in modules])  # a frozen script has no mode
    tensors = _own_tensors(modules)
    own, there = tuple(map(_own_tensor, tensors)), bytes(map(_has_gradient, tensors))
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    parallel = parallel_of(roots)
    around = (parallel_signature(parallel), there) if parallel else None
    there = b"" if parallel else there
    form = Form(positional, named, flags, own, autocast, around)
    return form, Sizes(tuple(sizes.each), tuple(sizes.numbers), sum(sizes.elements), there)


def sizes_of(argument: Any) -> tuple[int, int]:
    """Return how many sizes and whole numbers an argument has."""
    found = _Found([], [], [])
    _form(argument, found)
    return len(found.each), len(found.numbers)


def gradients_of(fn: Any, args: Sequence[Any], kwargs: dict[str, Any], names: Collection[str]) -> bytes:
    """Return ``Sizes.gradients`` of a step that finds these parameters' gradients."""
    roots = reachable_modules(fn, args, kwargs)
    known = {id(tensor) for name, _, tensor in named_tensors(roots) if name in names}
    return bytes(id(t) in known for t in _own_tensors(_all_modules(roots)))


def _own_tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """List parameters and buffers."""
    tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
    return [t for table in tables for t in table.values() if t is not None]


def _all_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """List modules and those inside them, each once.

    ``nn.Module.modules`` takes several times as long.
    """
    found: dict[int, nn.Module] = {}
    pending = list(roots)
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            pending += [m for m in module._modules.values() if m is not None]
    return list(found.values())


def _own_tensor(tensor: Tensor) -> tuple[Any, ...]:
    shape = None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return tensor.requires_grad, tensor.dtype, shape


def _has_gradient(tensor: Tensor) -> bool:
    return is_leaf(tensor) and tensor.grad is not None


class _Found(NamedTuple):
    """Sizes, whole numbers and elements of tensors, as they are met."""

    each: list[int]
    numbers: list[int]
    elements: list[int]


def _form(x: Any, found: _Found, *, in_list: bool = False, in_object: bool = False) -> Any:
    """Return the form of an argument; add its sizes to ``found``.

    Of objects, dataclasses and ``UserDict`` are looked into, not those inside them: these may be trees, or circles.
    """
    if isinstance(x, Tensor):
        return _form_of_tensor(x, found, in_list=in_list)
    if x is None or isinstance(x, (bool, Enum, torch.dtype, torch.device)):
        return x
    if isinstance(x, int):
        found.numbers.append(x)
        return int
    if type(x) is list:
        return _form_of_list(x, found, in_object=in_object)
    if type(x) is tuple:
        return tuple, tuple([_form(item, found, in_object=in_object) for item in x])
    if not torch.utils._pytree.tree_is_leaf(x):
        items, structure = torch.utils._pytree.tree_flatten(x, is_leaf=lambda part: part is not x)
        return structure, tuple([_form(item, found, in_object=in_object) for item in items])
    if not in_object and (parts := _parts_of(x)) is not None:
        return (type(x), *parts), tuple([_form(part, found, in_object=True) for part in parts.values()])
    return id(x) if isinstance(x, nn.Module) else type(x)


def _parts_of(x: Any) -> dict[Any, Any] | None:
    """Return an object's parts by name; None if nobody looks inside."""
    if isinstance(x, UserDict):
        return x.data
    if not is_dataclass(x) or isinstance(x, (type, nn.Module)):
        return None
    return {f.name: getattr(x, f.name, None) for f in fields(x)}


def _form_of_list(items: list[Any], found: _Found, *, in_object: bool) -> Any:
    """Return the form of a list; equal items have one form.

    Then the sizes are the number of items and their largest sizes.
    """
    own = [_Found([], [], found.elements) for _ in items]
    forms = [_form(x, f, in_list=True, in_object=in_object) for x, f in zip(items, own, strict=True)]
    if len(set(forms)) != 1:
        for f in own:
            found.each.extend(f.each)
            found.numbers.extend(f.numbers)
        return list, tuple(forms)
    found.each.append(len(forms))
    found.each.extend(max(sizes) for sizes in zip(*(f.each for f in own), strict=True))
    found.numbers.extend(max(numbers) for numbers in zip(*(f.numbers for f in own), strict=True))
    return list, "of", forms[0]


def _form_of_tensor(x: Tensor, found: _Found, *, in_list: bool) -> Any:
    grad = is_leaf(x) and x.grad is not None
    if is_jagged(x):  # every jagged tensor has a size symbol of its own; its offsets tell the size
        inside = Jagged.of(x)
        found.each.extend(inside.offsets.shape)
        return "jagged", _form_of_tensor(local_of(x), found, in_list=in_list), x.requires_grad, grad
    shape = tuple(x.shape)
    found.each.extend(shape)
    found.elements.append(local_of(x).numel())
    # Sizes 0 and 1 are special: torch skips copies of single rows, and broadcasts them.
    special = len(shape) if in_list else tuple([n if n < 2 else 2 for n in shape])
    around = getattr(x, "placements", None)
    return TensorForm(x.dtype, special, _order(x), x.device, x.requires_grad, grad, around)


def _order(x: Tensor) -> Any:
    """Describe how a tensor lies in memory, whatever its sizes.

    "" means in one piece, row by row; otherwise the order of the strides.
    """
    if x.layout is not torch.strided:
        return x.layout
    if x.is_contiguous():
        return ""
    strides = x.stride()
    order = tuple(sorted(range(len(strides)), key=lambda i: (-strides[i], i)))
    expected = 1
    for i in reversed(order):
        if x.shape[i] > 1 and strides[i] != expected:
            return order, tuple([s == 0 for s in strides]), "with gaps"
        expected *= x.shape[i]
    return order
