"""What tests of PyTorch's demands share: a step at its floor, a chain, and graphs to walk."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import autoremat


class Floor:
    """A callable checkpointed at the smallest budget that its first call fits into."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self.fn, self.options, self.budget = fn, options, 1
        self.call = self._wrapped()

    def _wrapped(self) -> Callable[..., Any]:
        def fresh(*args: Any, **kwargs: Any) -> Any:
            return self.fn(*args, **kwargs)

        return autoremat.checkpoint(fresh, budget=self.budget, **self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return self.call(*args, **kwargs)
            except autoremat.InfeasibleBudget as error:
                self.budget = max(self.budget + 1, error.floor_bytes)
                self.call = self._wrapped()

    @property
    def reruns(self) -> int:
        return autoremat.stats(self.call).reruns


def chain(x: Tensor) -> Tensor:
    for _ in range(4):
        x = x.exp().sin() * x.cos()
    return x


class Counts(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def grad(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def wrapped(x: Tensor) -> Tensor:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        return g

    return wrapped


def smooth(x: Tensor) -> Tensor:
    return x.sin().exp().sin()


def differentiates_inside(x: Tensor) -> Tensor:
    a, b = smooth(x), smooth(x)
    torch.autograd.grad(a.sum(), x)
    torch.autograd.grad(b.sum(), x)
    return x.sin().cos().sin()


def nested_ways(f: Callable[[Tensor], Tensor], c: Any) -> Iterator[tuple[Any, Any]]:
    yield f, c(f)
    yield f, c(c(f))
    yield grad(f), grad(c(f))
    yield grad(f), grad(c(c(f)))
    yield grad(grad(f)), grad(c(grad(f)))
    yield grad(grad(f)), c(grad(grad(c(f))))
    yield grad(grad(f)), grad(c(grad(c(f))))
    yield grad(grad(grad(f))), grad(c(grad(grad(c(f)))))
    yield grad(grad(grad(f))), grad(c(grad(c(grad(c(f))))))


def all_nodes(root: Any) -> list[Any]:
    pending, seen = [root], {root}
    while pending:
        for node, _ in pending.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                pending.append(node)
    return list(seen)


class Label:
    pass


def assert_the_graph_dies(fn: Callable[[Tensor], Tensor]) -> None:
    def labels() -> list[weakref.ref[Label]]:
        x = torch.randn(8, 8, requires_grad=True)
        found = []
        for node in all_nodes(fn(x).grad_fn):
            label = Label()
            node.metadata["label"] = label
            found.append(weakref.ref(label))
        return found

    refs = labels()
    gc.collect()
    assert refs
    assert not any(r() for r in refs)
