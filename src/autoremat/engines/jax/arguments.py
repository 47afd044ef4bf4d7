"""Arguments and results as flat lists of arrays; whatever is no array goes by, as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from autoremat.engines.jax.boxes import Box, boxes_of


def is_array(leaf: Any) -> bool:
    """Whether JAX may differentiate or trace a leaf: arrays, tracers, descriptions of arrays; no Python numbers."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@dataclass(frozen=True)
class Arguments:
    """What a function was called with.

    Attributes:
        leaves: of all arguments, in order.
        paths: what a person calls each leaf.
        positions: of the positional argument that each leaf belongs to; -1 for keyword arguments.
        tree: how to put them together.
        boxes: what of them a function may change.
        static: positional arguments that are handed on untouched, by position.
        n_positional: how many positional arguments there are, static ones included.
    """

    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    positions: tuple[int, ...]
    tree: Any
    boxes: tuple[Box, ...]
    static: Mapping[int, Any]
    n_positional: int

    @staticmethod
    def of(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], static: Sequence[int]) -> Arguments:
        """The arguments of a call; negative positions count from the end."""
        positions = {p % len(args) for p in static if -len(args) <= p < len(args)}
        dynamic = {k: a for k, a in enumerate(args) if k not in positions}
        flat, tree = tree_flatten_with_path((dynamic, dict(kwargs)))
        names = _parameter_names(fn, len(args))
        paths = tuple(_path_text(path, names) for path, _ in flat)
        leaves = tuple(leaf for _, leaf in flat)
        at = tuple(path[1].key if path[0].idx == 0 else -1 for path, _ in flat)
        boxes = boxes_of((dynamic, dict(kwargs)))
        return Arguments(leaves, paths, at, tree, boxes, {k: args[k] for k in positions}, len(args))

    @property
    def arrays(self) -> list[Any]:
        """The leaves that are arrays."""
        return [leaf for leaf in self.leaves if is_array(leaf)]

    @property
    def array_paths(self) -> tuple[str, ...]:
        """What a person calls each of the arrays."""
        return tuple(p for p, leaf in zip(self.paths, self.leaves, strict=True) if is_array(leaf))

    @property
    def array_positions(self) -> tuple[int, ...]:
        """The position of each of the arrays."""
        return tuple(p for p, leaf in zip(self.positions, self.leaves, strict=True) if is_array(leaf))

    def call(self, fn: Callable[..., Any], arrays: Sequence[Any]) -> tuple[Any, dict[int, Any]]:
        """Call a function with other arrays; returns its result, and what it has changed, by position of the leaf.

        Raises:
            TypeError: it has changed one of its arguments that cannot be changed from here.
        """
        rest = iter(arrays)
        leaves = [next(rest) if is_array(leaf) else leaf for leaf in self.leaves]
        dynamic, kwargs = jax.tree.unflatten(self.tree, leaves)
        args = [self.static[k] if k in self.static else dynamic[k] for k in range(self.n_positional)]
        result = fn(*args, **kwargs)
        return result, self._changes(leaves, (dynamic, kwargs))

    def update(self, changes: Mapping[int, Any]) -> None:
        """Change the user's own arguments as the function has changed its copies."""
        for box in self.boxes:
            if not changes.keys().isdisjoint(box.leaves):
                box.put(changes)

    def _changes(self, leaves: Sequence[Any], after: Any) -> dict[int, Any]:
        """A function works on copies of mutable arguments: what it changes there would be lost without a word."""
        now, tree = jax.tree.flatten(after)
        changed = [k for k, (a, b) in enumerate(zip(leaves, now, strict=False)) if not _is_same(a, b)]
        own = {k for box in self.boxes if not box.is_shared for k in box.leaves if is_array(self.leaves[k])}
        if tree == self.tree and own.issuperset(changed) and all(is_array(now[k]) for k in changed):
            return {k: now[k] for k in changed}
        shared = {k for box in self.boxes if box.is_shared for k in box.leaves}
        lost = [k for k in changed if k not in own]
        names = [self.paths[k] for k in lost[:3]] or ["its form"]
        cause = " that it holds twice" if shared.intersection(lost) else ""
        raise TypeError(
            f"the checkpointed function changes its argument in place ({', '.join(names)}{cause}), and autoremat.jax "
            "calls it with copies: what it changes would be lost. Return the new state instead, as an auxiliary "
            "output. For Flax NNX: graph, params, rest = nnx.split(model, nnx.Param, ...) outside; in the function "
            "model = nnx.merge(graph, params, rest, copy=True), and return loss, nnx.split(model, nnx.Param, ...)[2]; "
            "outside jax.value_and_grad(..., has_aux=True)(params, rest), and nnx.update(model, rest)"
        )


def _is_same(before: Any, after: Any) -> bool:
    """Whether a leaf is what it was."""
    return before is after or not (is_array(before) or is_array(after) or before != after)


def _parameter_names(fn: Callable[..., Any], n: int) -> list[str]:
    """Names of the positional parameters of a function."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [*named[:n], *(f"argument {k}" for k in range(len(named), n))]


def _path_text(path: Sequence[Any], names: Sequence[str]) -> str:
    """``params['layers'][0]`` for a leaf of the parameter ``params``."""
    head, key, *rest = path
    first = names[key.key] if head.idx == 0 else str(key.key)
    return first + keystr(tuple(rest))


@dataclass
class Results:
    """What a function returned and changed, put aside while it was traced: its arrays come back another way."""

    leaves: tuple[Any, ...] = ()
    arrays: tuple[bool, ...] = ()
    paths: tuple[str, ...] = ()
    tree: Any = None
    changed: tuple[int, ...] = ()

    def take(self, result: Any, changes: Mapping[int, Any]) -> list[Any]:
        """Keep the form of a result; returns its arrays, and those that arguments have from now on."""
        flat, self.tree = tree_flatten_with_path(result)
        self.leaves = tuple(leaf if not is_array(leaf) else None for _, leaf in flat)
        self.paths = tuple(f"output{keystr(path)}" for path, leaf in flat if is_array(leaf))
        self.arrays, self.changed = tuple(is_array(leaf) for _, leaf in flat), tuple(changes)
        return [*(leaf for _, leaf in flat if is_array(leaf)), *changes.values()]

    def put(self, arrays: Sequence[Any]) -> Any:
        """A result of the same form with other arrays."""
        rest = iter(arrays)
        leaves = [next(rest) if a else leaf for leaf, a in zip(self.leaves, self.arrays, strict=True)]
        return jax.tree.unflatten(self.tree, leaves)

    def changes(self, arrays: Sequence[Any]) -> dict[int, Any]:
        """What arguments have from now on, by position of the leaf."""
        return dict(zip(self.changed, arrays[sum(self.arrays) :], strict=True))
