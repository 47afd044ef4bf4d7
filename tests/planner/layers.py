"""Layers as calls: a program by hand whose ops run again as prefixes of calls."""

from __future__ import annotations

from autoremat.program import Once, Op, Program, Value

BACKWARD = {"phase": "backward", "once": Once.BACKWARD}


def layers(n: int) -> Program:
    """``n`` layers of ``linear`` under autocast and an activation; the backward asks for what autograd saves."""
    values, ops, saved = [Value("x0", 400, fixed=True), Value("w", 100, fixed=True)], list[Op](), []
    x = 0
    for k in range(n):
        i, v = len(ops), len(values)
        values += [Value(f"xh{k}", 200, available=i + 1), Value(f"wh{k}", 50, available=i + 1)]
        values += [Value(f"y{k}", 200, available=i + 2), Value(f"x{k + 1}", 400)]
        ops += [
            Op("cast", (x,), (v,), 1.0, call=2 * k, module=f"layers.{k}"),
            Op("cast", (1,), (v + 1,), 0.5, call=2 * k, module=f"layers.{k}"),
            Op("mm", (v, v + 1), (v + 2,), 8.0, call=2 * k, module=f"layers.{k}"),
            Op("gelu", (v + 2,), (v + 3,), 2.0, call=2 * k + 1, module=f"layers.{k}"),
        ]
        saved.append((v, v + 1, v + 2))
        x = v + 3
    values.append(Value("dx", 400))
    grad = len(values) - 1
    ops.append(Op("ones", (x,), (grad,), **BACKWARD))
    for xh, wh, y in reversed(saved):
        v = len(values)
        values += [Value(f"dy:{v}", 200), Value(f"dx:{v}", 400)]
        ops += [
            Op("unpack", (y,), (), **BACKWARD, kind="ask"),
            Op("gelu_backward", (y, grad), (v,), 2.0, **BACKWARD),
            Op("unpack", (xh,), (), **BACKWARD, kind="ask"),
            Op("unpack", (wh,), (), **BACKWARD, kind="ask"),
            Op("mm_backward", (xh, wh, v), (v + 1,), 16.0, **BACKWARD),
        ]
        grad = v + 1
    return Program("layers", tuple(values), tuple(ops))


def stack(n: int) -> Program:
    """A chain of ``n`` equal layers of two ops each, and its backward; the last one's is a loss as well."""
    values, ops = [Value("x", 64, fixed=True)], list[Op]()

    def write(name: str, nbytes: int, reads: tuple[int, ...], seconds: float, phase: str = "forward") -> int:
        values.append(Value(f"v{len(values)}", nbytes))
        ops.append(Op(name, reads, (len(values) - 1,), seconds, phase=phase))
        return len(values) - 1

    inputs, hidden = [0], []
    for _ in range(n):
        hidden.append(write("widen", 256, (inputs[-1],), 2.0))
        inputs.append(write("narrow", 64, (hidden[-1],), 1.0))
    gradient = write("loss", 64, (inputs[-1],), 1.0, "backward")
    for k in reversed(range(n)):
        wide = write("narrow backward", 256, (gradient, hidden[k]), 2.0, "backward")
        gradient = write("widen backward", 64, (wide, inputs[k]), 4.0, "backward")
    return Program(f"stack of {n}", tuple(values), tuple(ops))


def recurrence(steps: int) -> Program:
    """A cell unrolled over time with weights that all steps read, and a loss at every step."""
    values, ops = [Value("weights", 512, fixed=True), Value("start", 32, fixed=True)], list[Op]()

    def write(name: str, nbytes: int, reads: tuple[int, ...], seconds: float, phase: str = "forward") -> int:
        values.append(Value(f"v{len(values)}", nbytes))
        ops.append(Op(name, reads, (len(values) - 1,), seconds, phase=phase))
        return len(values) - 1

    states, gates, losses = [1], [], []
    for _ in range(steps):
        gates.append(write("gates", 128, (0, states[-1]), 3.0))
        states.append(write("cell", 32, (gates[-1], states[-1]), 1.0))
        losses.append(write("loss", 4, (states[-1],), 0.5))
    gradient: tuple[int, ...] = ()
    for t in reversed(range(steps)):
        here = write("cell backward", 128, (gates[t], states[t], states[t + 1], losses[t], *gradient), 2.0, "backward")
        gradient = (write("gates backward", 32, (0, here, states[t]), 6.0, "backward"),)
    return Program(f"recurrence of {steps}", tuple(values), tuple(ops))
