"""The program of a larger or smaller input, from two recordings.

Both recordings have the same calls.

Bytes are polynomials in the sizes of the input. Between two recordings a value has grown by some power of the sizes;
rounded up to a whole one, that power bounds it from above for all larger sizes, as long as its coefficients are not
negative and its degree is not higher than that. For smaller sizes, what has grown by a whole power shrinks by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter, eq

from autoremat.program import Op, Program

_HAIR = 0.02
"""Powers this close to a whole number are that."""
_Change = Callable[[int, int], int]


_OF_OPS = attrgetter("name", "reads", "writes", "call", "in_place", "once")
_OF_VALUES = attrgetter("fixed", "held", "available", "dtype")


def is_same(a: Program, b: Program) -> bool:
    """Tell whether two programs differ only in sizes and costs."""
    return (
        len(a.ops) == len(b.ops)
        and len(a.values) == len(b.values)
        and all(map(eq, map(_OF_OPS, a.ops), map(_OF_OPS, b.ops)))
        and all(map(eq, map(_OF_VALUES, a.values), map(_OF_VALUES, b.values)))
    )


def grown(small: Program, large: Program, between: float, further: float) -> Program | None:
    """Extrapolate the program of a step with still larger sizes.

    None where the two are not the same but for sizes. O(program).

    Args:
        small: of a step.
        large: of the same step with a larger input.
        between: by how much sizes have grown from the one to the other, at least; above 1.
        further: by how much they are to grow further, at most.

    Example:
        >>> from autoremat.program import Op, Program, Value
        >>> def step(n):
        ...     values = Value("x", 4 * n, fixed=True), Value("scores", n * n), Value("loss", 4)
        ...     return Program("step", values, (Op("f", (0,), (1,), 1e-9 * n), Op("g", (1,), (2,))))
        >>> [v.nbytes for v in grown(step(10), step(20), 2.0, 1.5).values] == [v.nbytes for v in step(30).values]
        True
    """
    if between <= 1 or not is_same(small, large):
        return None
    return _changed(
        small, large, lambda a, b: grown_number(a, b, between, further),
        lambda a, b: _grown_seconds(a, b, between, further),
    )  # fmt: skip


def shrunk(small: Program, large: Program, between: float, to: float) -> Program | None:
    """Make the program of a step with smaller sizes.

    None where the two are not the same but for sizes. O(program).

    Args:
        small: of a step.
        large: of the same step with a larger input.
        between: by how much sizes have grown from the one to the other, at least; above 1.
        to: which share of the large sizes they are to have, at most.
    """
    if between <= 1 or not is_same(small, large):
        return None
    return _changed(small, large, lambda a, b: shrunk_number(a, b, between, to), lambda a, b: b * to)


def _changed(small: Program, large: Program, number: _Change, seconds: Callable[[float, float], float]) -> Program:
    values = tuple(
        replace(b, nbytes=number(a.nbytes, b.nbytes), shape=None)
        for a, b in zip(small.values, large.values, strict=True)
    )
    ops = tuple(_changed_op(a, b, number, seconds) for a, b in zip(small.ops, large.ops, strict=True))
    return replace(large, values=values, ops=ops)


def _changed_op(a: Op, b: Op, number: _Change, seconds: Callable[[float, float], float]) -> Op:
    again_seconds, again_scratch = b.rerun_seconds, b.rerun_scratch_bytes
    if again_seconds is not None:
        again_seconds = seconds(a.again_seconds, again_seconds)
    if again_scratch is not None:
        again_scratch = number(a.again_scratch_bytes, again_scratch)
    return replace(
        b,
        seconds=seconds(a.seconds, b.seconds),
        scratch_bytes=number(a.scratch_bytes, b.scratch_bytes),
        rerun_seconds=again_seconds,
        rerun_scratch_bytes=again_scratch,
    )


def grown_number(a: int, b: int, between: float, further: float) -> int:
    """Bound what was ``a`` and is ``b`` when sizes grow further."""
    if b <= a or a <= 0:
        return math.ceil(max(a, b) * (further if b != a else 1.0))
    power = math.ceil(math.log(b / a) / math.log(between) - _HAIR)
    return math.ceil(b * further**power)


def shrunk_number(a: int, b: int, between: float, to: float) -> int:
    """Find an upper bound of a number at a share of sizes.

    The number was ``a`` at the smaller sizes and is ``b`` at the larger ones; the share is of the larger ones.

    What has not grown by a whole power is a sum of several; it is taken not to shrink.
    """
    if b <= a or a <= 0:
        return max(a, b)
    power = math.log(b / a) / math.log(between)
    if abs(power - round(power)) > _HAIR:
        return b
    share = float(to ** round(power))
    return math.ceil(b * (share + _HAIR * (1 - share)))


def _grown_seconds(a: float, b: float, between: float, further: float) -> float:
    """Extrapolate noisy seconds: no more than the third power."""
    if b <= a or a <= 0:
        return max(a, b)
    return float(b * further ** min(3.0, math.log(b / a) / math.log(between)))
