"""Runs a scan and its backward by a choice: what is stacked, what is carried, and what runs again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import register_dataclass

from autoremat.engines.jax.lowering import fence
from autoremat.engines.jax.recording import Flat
from autoremat.engines.jax.scans import Choice, Shape

Arrays = Sequence[Any]
Choose = Callable[[Sequence[bool]], Choice]
"""From which of the inputs are differentiated to a choice."""


@functools.partial(register_dataclass, data_fields=["consts", "xs", "stacked"], meta_fields=["loop"])
@dataclass(frozen=True, eq=False)
class SavedScan:
    """What goes from the forward of a scan to its backward."""

    consts: Arrays
    xs: Arrays
    stacked: Any
    loop: Loop


def scanned(shape: Shape, body: Flat, inputs: Arrays, run: Callable[..., Arrays], choose: Choose) -> list[Any]:
    """A scan with a gradient of our own.

    Args:
        shape: its form.
        body: constants, carry and elements to carry and elements.
        inputs: of the scan: constants, first carry, stacked elements.
        run: the scan as it is, where nobody differentiates.
        choose: how to run it where somebody does.
    """

    def forward(*primals: Any) -> tuple[list[Any], SavedScan]:
        values = [p.value for p in primals]
        loop = Loop(shape, body, choose([p.perturbed for p in primals]))
        carry, ys, stacked = loop.forward(*_parted(shape, values))
        consts, _, xs = _parted(shape, values)
        return [*carry, *ys], SavedScan(consts, xs, stacked, loop)

    def backward(saved: SavedScan, cotangents: Arrays) -> tuple[Any, ...]:
        return saved.loop.gradients(saved.consts, saved.xs, saved.stacked, cotangents)

    rule = jax.custom_vjp(lambda *xs: list(run(*xs)))
    rule.defvjp(forward, backward, symbolic_zeros=True)
    return list(rule(*inputs))


def _parted(shape: Shape, values: Arrays) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carry, elements."""
    first, second = shape.n_consts, shape.n_consts + shape.n_carry
    return list(values[:first]), list(values[first:second]), list(values[second:])


@dataclass(frozen=True, eq=False)
class Loop:
    """A scan under a choice."""

    shape: Shape
    body: Flat
    choice: Choice

    @property
    def _wanted(self) -> tuple[list[bool], list[bool], list[bool]]:
        """Of constants, carry and elements, which have a gradient."""
        return _parted(self.shape, self.choice.body.recorded.is_differentiated)

    @property
    def _carried(self) -> list[bool]:
        """Of the carry, what every iteration stacks because its backward reads it."""
        return _parted(self.shape, self.choice.body.kept_arguments)[1]

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, consts: Arrays, carry: Arrays, xs: Arrays) -> tuple[list[Any], list[Any], Any]:
        """The last carry, the stacked results, and what the backward needs."""
        return self._forward(consts, carry, xs, self.shape.length, self.choice.segments)

    def _forward(
        self, consts: Arrays, carry: Arrays, xs: Arrays, length: int, segments: tuple[int, ...]
    ) -> tuple[list[Any], list[Any], Any]:
        if not segments:
            return self._forward_of_all(consts, carry, xs, length)
        main, rest = self._divided(xs, length, segments[0])

        def segment(c: Any, x: Any) -> Any:
            after, ys = self._plain(consts, c, x, segments[0])
            return after, (ys, c)

        count = length // segments[0]
        last, (ys, begins) = lax.scan(segment, list(carry), main, length=count, reverse=self.shape.is_reversed)
        ys = [_joined(y) for y in ys]
        if not length % segments[0]:
            return last, ys, (begins, None)
        after, more = self._plain(consts, last, rest, length % segments[0])
        return after, self._concatenated(ys, more), (begins, last)

    def _plain(self, consts: Arrays, carry: Arrays, xs: Arrays, length: int) -> tuple[list[Any], list[Any]]:
        def once(c: Any, x: Any) -> Any:
            out = list(self.body(*consts, *c, *x))
            return out[: self.shape.n_carry], out[self.shape.n_carry :]

        return self._iterated(once, list(carry), list(xs), length, reverse=self.shape.is_reversed)

    def _forward_of_all(
        self, consts: Arrays, carry: Arrays, xs: Arrays, length: int
    ) -> tuple[list[Any], list[Any], Any]:
        def once(c: Any, x: Any) -> Any:
            outs, _, kept = self.choice.body.forward([*consts, *c, *x])
            return outs[: self.shape.n_carry], (outs[self.shape.n_carry :], kept, _some(c, self._carried))

        last, (ys, kept, carried) = self._iterated(once, list(carry), list(xs), length, reverse=self.shape.is_reversed)
        return last, ys, (kept, carried)

    # ---- backward ---------------------------------------------------------------------------------------------------

    def gradients(self, consts: Arrays, xs: Arrays, stacked: Any, cotangents: Arrays) -> tuple[Any, ...]:
        """One for each input of the scan; None for those that are not differentiated."""
        takes = self.choice.body.recorded.takes_cotangent
        n = self.shape.n_carry
        given = [_full(c) if t else None for c, t in zip(cotangents, takes, strict=True)]
        state = (
            [c for c, w in zip(given[:n], self._wanted[1], strict=True) if w],
            [jnp.zeros_like(c) for c, w in zip(consts, self._wanted[0], strict=True) if w],
        )
        of_ys = [c for c in given[n:] if c is not None]
        (of_carry, of_consts), of_xs = self._backward(
            consts, xs, stacked, state, of_ys, self.shape.length, self.choice.segments
        )
        found = [iter(of_consts), iter(of_carry), iter(of_xs)]
        return tuple(
            next(gradients) if w else None
            for gradients, wanted in zip(found, self._wanted, strict=True)
            for w in wanted
        )

    def _backward(
        self, consts: Arrays, xs: Arrays, stacked: Any, state: Any, of_ys: Arrays, length: int,
        segments: tuple[int, ...],
    ) -> tuple[Any, list[Any]]:  # fmt: skip
        """``state``: cotangents of the carry and sums for the constants; with it, the gradients of the elements."""
        if not segments:
            return self._backward_of_all(consts, xs, stacked, state, of_ys, length)
        begins, begin_of_rest = stacked
        (main, rest), (of_main, of_rest) = (self._divided(a, length, segments[0]) for a in (xs, of_ys))

        def again(state: Any, x: Arrays, begin: Arrays, of_y: Arrays, size: int) -> tuple[Any, list[Any]]:
            leaves, tree = jax.tree.flatten((begin, state, x))
            begin, state, x = jax.tree.unflatten(tree, fence(leaves))
            inner = tuple(s for s in segments[1:] if s < size)
            _, _, saved = self._forward(consts, begin, x, size, inner)
            return self._backward(consts, x, saved, state, of_y, size, inner)

        more = None
        if begin_of_rest is not None:
            state, more = again(state, rest, begin_of_rest, of_rest, length % segments[0])

        def segment(state: Any, given: Any) -> Any:
            x, begin, of_y = given
            return again(state, x, begin, of_y, segments[0])

        state, of_xs = lax.scan(
            segment, state, (main, begins, of_main), length=length // segments[0], reverse=not self.shape.is_reversed
        )
        of_xs = [_joined(g) for g in of_xs]
        return state, of_xs if more is None else self._concatenated(of_xs, more)

    def _backward_of_all(
        self, consts: Arrays, xs: Arrays, stacked: Any, state: Any, of_ys: Arrays, length: int
    ) -> tuple[Any, list[Any]]:
        body = self.choice.body

        def once(state: Any, given: Any) -> Any:
            of_carry, sums = state
            x, kept, carried, of_y = given
            known = iter(carried)
            carry = [next(known) if c else None for c in self._carried]
            passed = _some([*consts, *carry, *x], body.kept_arguments)
            found = iter(body.backward(passed, kept, self._cotangents(of_carry, of_y)))
            of_consts, of_carry, of_x = ([next(found) for w in wanted if w] for wanted in self._wanted)
            return (of_carry, [s + g for s, g in zip(sums, of_consts, strict=True)]), of_x

        return self._iterated(
            once, state, (list(xs), *stacked, list(of_ys)), length, reverse=not self.shape.is_reversed
        )

    def _cotangents(self, of_carry: Arrays, of_y: Arrays) -> list[Any]:
        """Cotangents of the body's results; those of a carry that nothing depends on are zero."""
        recorded, n = self.choice.body.recorded, self.shape.n_carry
        known = iter(of_carry)
        given = []
        for out, takes, wanted in zip(
            recorded.graph.outputs[:n], recorded.takes_cotangent, self._wanted[1], strict=False
        ):
            if takes:
                aval = recorded.graph.avals[out] if isinstance(out, int) else jax.typeof(out.value)
                given.append(next(known) if wanted else jnp.zeros(aval.shape, aval.dtype))
        return [*given, *of_y]

    def _iterated(self, once: Callable[..., Any], state: Any, given: Any, length: int, *, reverse: bool) -> Any:
        """Run the loop over iterations.

        Unrolled as the user's is where nothing runs again: else iterations side by side would take more than planned.
        """
        unroll = 1 if self.choice.extra_seconds else min(self.shape.unroll, length)
        return lax.scan(once, state, given, length=length, reverse=reverse, unroll=unroll)

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _divided(self, arrays: Arrays, length: int, size: int) -> tuple[list[Any], list[Any]]:
        """Stacked arrays as segments, in the order in which they come, and what is left over at the end of it."""
        whole = length - length % size
        if whole == length:
            return [_split(a, size) for a in arrays], []
        if self.shape.is_reversed:
            return [_split(a[length - whole :], size) for a in arrays], [a[: length - whole] for a in arrays]
        return [_split(a[:whole], size) for a in arrays], [a[whole:] for a in arrays]

    def _concatenated(self, main: Arrays, rest: Arrays) -> list[Any]:
        """The inverse, of segments that have been joined."""
        pairs = zip(rest, main, strict=True) if self.shape.is_reversed else zip(main, rest, strict=True)
        return [jnp.concatenate(pair) for pair in pairs]


def _some(values: Arrays, chosen: Sequence[bool]) -> list[Any]:
    return [v for v, c in zip(values, chosen, strict=True) if c]


def _split(array: Any, size: int) -> Any:
    return array.reshape(math.floor(array.shape[0] / size), size, *array.shape[1:])


def _joined(array: Any) -> Any:
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def _full(cotangent: Any) -> Any:
    if not isinstance(cotangent, SymbolicZero):
        return cotangent
    return jnp.zeros(cotangent.aval.shape, cotangent.aval.dtype)
