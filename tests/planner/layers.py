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
