"""Programs of steps that are not run: on types and shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from autoremat.engines.jax.facts import is_inexact
from autoremat.engines.jax.variants import Variants
from autoremat.engines.jax.wrapping import trace


def record_step(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], argnums: int | Sequence[int] = 0,
    static: Sequence[int] = (),
) -> Variants:  # fmt: skip
    """The step of a function and its gradient with respect to some of its arguments.

    Raises:
        ValueError: nothing among those arguments can be differentiated; or the function has an effect.
        TypeError: a position that is not there; or the function changes an argument.
    """
    fn = getattr(fn, "__wrapped_by_autoremat__", fn)
    chosen = {argnums} if isinstance(argnums, int) else set(argnums)
    if missing := [k for k in chosen if not -len(args) <= k < len(args)]:
        raise TypeError(f"argnums names position {missing[0]}, but there are {len(args)} positional arguments")
    chosen = {k % len(args) for k in chosen}
    traced = trace(fn, _described(args), _described(kwargs), static)
    n_constants = len(traced.arrays) - len(traced.positions)
    is_chosen = [False] * n_constants + [p in chosen for p in traced.positions]
    avals = [_aval(a) for a in traced.arrays]
    is_differentiated = [c and is_inexact(a) for c, a in zip(is_chosen, avals, strict=True)]
    if not any(is_differentiated):
        raise ValueError(
            f"nothing to differentiate: argnums={argnums} names no array of floating-point numbers of "
            f"{traced.names.step}"
        )
    return Variants(traced.closed, avals, is_differentiated, traced.names)


def _described(tree: Any) -> Any:
    """The same with types and shapes in the place of arrays, so that nothing is computed on them."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_concrete(leaf) else leaf, tree)


def _is_concrete(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _aval(array: Any) -> Any:
    return array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
