"""Random graphs by seed, for the exact solver: the same in a test, in a benchmark and in a report."""

from __future__ import annotations

import random

from autoremat.program import END, Op, Program, Value


def graph(seed: int, n_ops: int) -> Program:
    """A directed acyclic graph, every op may run again: each reads up to three earlier values, some long ago."""
    dice = random.Random(seed)
    values, ops, made = [Value("x", 3, fixed=True)], list[Op](), list[int]()
    for k in range(n_ops):
        recent, any_one = made[-2:] or [0], made or [0]
        reads = {dice.choice(recent), *(dice.choice(any_one) for _ in range(dice.choice((0, 1, 1, 2))))}
        values.append(Value(f"v{k}", dice.randint(1, 40), held=END if k == n_ops - 1 else None))
        ops.append(Op(f"op{k}", tuple(sorted(reads)), (len(values) - 1,), dice.randint(1, 12) / 4))
        made.append(len(values) - 1)
    return Program(f"graph {seed}", tuple(values), tuple(ops))


def layered(seed: int, n_ops: int) -> Program:
    """Forward nodes in layers of one to three with skips, then one backward node each; every op may run again.

    The backward node of ``f`` reads the gradients from the readers of ``f``, what ``f`` reads and perhaps its output.
    """
    dice = random.Random(seed)
    values, ops = [Value("x", 3, fixed=True)], list[Op]()
    inputs: list[tuple[int, ...]] = []
    layers: list[list[int]] = [[0]]
    while len(inputs) < n_ops // 2:
        layer: list[int] = []
        for _ in range(min(dice.choice((1, 1, 2, 3)), n_ops // 2 - len(inputs))):
            reads = {dice.choice(layers[-1])}
            if dice.random() < 0.35:
                reads.add(dice.choice([v for old in layers[-4:] for v in old]))
            inputs.append(tuple(sorted(reads)))
            values.append(Value(f"f{len(inputs)}", dice.randint(4, 40)))
            ops.append(Op(f"f{len(inputs)}", inputs[-1], (len(values) - 1,), dice.randint(1, 20) / 4))
            layer.append(len(values) - 1)
        layers.append(layer)
    _backward(dice, values, ops, inputs)
    return Program(f"layered {seed}", tuple(values), tuple(ops))


def _backward(dice: random.Random, values: list[Value], ops: list[Op], inputs: list[tuple[int, ...]]) -> None:
    grad_of: dict[int, int] = {}
    for k in reversed(range(len(inputs))):
        grads = [grad_of[j] for j in range(k + 1, len(inputs)) if k + 1 in inputs[j]]
        saved = [v for v in inputs[k] if v] + ([k + 1] if dice.random() < 0.4 else [])
        values.append(Value(f"b{k + 1}", values[k + 1].nbytes))
        grad_of[k] = len(values) - 1
        ops.append(
            Op(
                f"b{k + 1}",
                tuple(dict.fromkeys((*grads, *saved))),
                (grad_of[k],),
                dice.randint(2, 30) / 4,
                0,
                "backward",
            )
        )


def checkmate_chain(layers: int, unit_bytes: int) -> Program:
    """The linear network of Checkmate: unit costs and sizes, the backward of a layer reads its output."""
    values = [Value(f"f{k}", unit_bytes) for k in range(layers)] + [Value("loss", unit_bytes)]
    ops = [Op(f"f{k}", (k - 1,) if k else (), (k,), 1.0) for k in range(layers)]
    ops.append(Op("loss", (layers - 1,), (layers,), 1.0))
    for k in reversed(range(layers)):
        values.append(Value(f"b{k}", unit_bytes))
        ops.append(Op(f"b{k}", (len(values) - 2, k), (len(values) - 1,), 1.0))
    return Program(f"checkmate {layers}", tuple(values), tuple(ops))
