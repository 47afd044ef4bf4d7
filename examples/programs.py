"""Small programs to try planners on: a chain, a chain of unequal layers, a network with long skips. No torch needed.

from examples.programs import chain
autoremat.solve(chain(64), "30%")
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoremat.program import END, Once, Op, Program, Value


@dataclass(frozen=True)
class Layer:
    """One forward op: the layers whose results it reads (-1: the input), the bytes of its result, its seconds."""

    reads: tuple[int, ...]
    nbytes: int = 100
    seconds: float = 1.0


def step(name: str, layers: Sequence[Layer]) -> Program:
    """A training step of these layers: forward, then the backward of each, last one first.

    The backward of a layer reads what the layer read and the gradient that was made last, writes a gradient of 100
    bytes, and takes twice the layer's seconds.
    """
    values = [Value("x", 0, fixed=True), *(Value(f"a{k}", layer.nbytes) for k, layer in enumerate(layers))]
    inputs = [tuple(r + 1 for r in layer.reads) for layer in layers]
    ops = [Op(f"f{k}", inputs[k], (k + 1,), layer.seconds, module=f"layers.{k}") for k, layer in enumerate(layers)]
    gradient = len(layers)  # the last layer's result stands in for the loss
    for k, layer in reversed(list(enumerate(layers))):
        values.append(Value(f"g{k}", 100, held=None if k else END))
        reads, gradient = (*inputs[k], gradient), len(values) - 1
        ops.append(
            Op(f"b{k}", reads, (gradient,), 2 * layer.seconds, phase="backward", once=Once.BACKWARD,
               module=f"layers.{k}")
        )  # fmt: skip
    return Program(name, tuple(values), tuple(ops))


def chain(n: int) -> Program:
    """Equal layers, each of which reads the one before: 100 bytes and one second each."""
    return step(f"chain of {n}", [Layer((k - 1,)) for k in range(n)])


def uneven(sizes: Iterable[int], seconds: Iterable[float]) -> Program:
    """A chain whose layers differ."""
    sizes = list(sizes)
    return step("uneven chain", [Layer((k - 1,), b, s) for k, (b, s) in enumerate(zip(sizes, seconds, strict=True))])


def hourglass(depth: int) -> Program:
    """Down and up again, like a U-Net: layer k of the way up also reads layer ``depth - 1 - k`` of the way down."""
    down = [Layer((k - 1,)) for k in range(depth)]
    up = [Layer((depth - 1 + k, depth - 1 - k)) for k in range(depth)]
    return step(f"hourglass of depth {depth}", [*down, *up])
