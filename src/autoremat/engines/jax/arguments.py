"""Arguments and results as flat lists of arrays; whatever is no array goes by, as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path


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
        static: positional arguments that are handed on untouched, by position.
        n_positional: how many positional arguments there are, static ones included.
    """

    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    positions: tuple[int, ...]
    tree: Any
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
        return Arguments(leaves, paths, at, tree, {k: args[k] for k in positions}, len(args))

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

    def call(self, fn: Callable[..., Any], arrays: Sequence[Any]) -> Any:
        """Call a function with other arrays.

        Raises:
            TypeError: it has changed one of its arguments.
        """
        rest = iter(arrays)
        leaves = [next(rest) if is_array(leaf) else leaf for leaf in self.leaves]
        dynamic, kwargs = jax.tree.unflatten(self.tree, leaves)
        args = [self.static[k] if k in self.static else dynamic[k] for k in range(self.n_positional)]
        result = fn(*args, **kwargs)
        self._refuse_changes(leaves, (dynamic, kwargs))
        return result

    def _refuse_changes(self, leaves: Sequence[Any], after: Any) -> None:
        """A function works on copies of mutable arguments: what it changes there would be lost without a word."""
        now, tree = jax.tree.flatten(after)
        if tree == self.tree and all(map(_is_same, leaves, now)):
            return
        changed = [p for p, a, b in zip(self.paths, leaves, now, strict=False) if not _is_same(a, b)] or ["its form"]
        raise TypeError(
            f"the checkpointed function changes its argument in place ({', '.join(changed[:3])}), and autoremat.jax "
            "calls it with copies: what it changes would be lost. Return the new state instead, as an auxiliary output "
            "(for Flax NNX: split the module outside, merge it inside with copy=True, split it there again and return "
            "the state)"
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
    """What a function returned, put aside while it was traced: its arrays come back another way."""

    leaves: tuple[Any, ...] = ()
    arrays: tuple[bool, ...] = ()
    paths: tuple[str, ...] = ()
    tree: Any = None

    def take(self, result: Any) -> list[Any]:
        """Keep the form of a result; returns its arrays."""
        flat, self.tree = tree_flatten_with_path(result)
        self.leaves = tuple(leaf if not is_array(leaf) else None for _, leaf in flat)
        self.paths = tuple(f"output{keystr(path)}" for path, leaf in flat if is_array(leaf))
        self.arrays = tuple(is_array(leaf) for _, leaf in flat)
        return [leaf for _, leaf in flat if is_array(leaf)]

    def put(self, arrays: Sequence[Any]) -> Any:
        """A result of the same form with other arrays."""
        rest = iter(arrays)
        leaves = [next(rest) if a else leaf for leaf, a in zip(self.leaves, self.arrays, strict=True)]
        return jax.tree.unflatten(self.tree, leaves)
