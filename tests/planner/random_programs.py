"""Random training steps in which there is something to choose: large saved values, cheap and expensive ops."""

from __future__ import annotations

from hypothesis import strategies as st

from autoremat.program import Once, Op, Program, Value
from tests.planner.chains import Builder


@st.composite
def recorded_steps(draw: st.DrawFn, min_ops: int = 5, max_ops: int = 14) -> Program:
    """A step of the recorded shape: skips, branches, some ops that must not run again, some in place."""
    b = Builder()
    x = b.fixed("x", 5)
    have, saved_so_far = [x], set[int]()
    for k in range(draw(st.integers(min_ops, max_ops))):
        source = have[-1]
        size, seconds = draw(st.integers(1, 40)), draw(st.integers(0, 12)) / 4
        in_place = source != x and source not in saved_so_far and draw(st.integers(0, 4)) == 0
        if in_place:
            have.pop()
            size = b.values[source].nbytes
        reads = tuple(dict.fromkeys((source, draw(st.sampled_from(have[-4:] or [x])))))
        once = draw(st.sampled_from((None, None, None, None, None, Once.GIVEN)))
        choices = [v for v in reads if v != x and not (in_place and v == source)]
        saves = tuple(draw(st.lists(st.sampled_from(choices), unique=True))) if choices else ()
        out = b.forward(
            f"f{k}",
            reads,
            size,
            seconds,
            saves=saves,
            saves_output=draw(st.booleans()),
            once=once,
            grad_bytes=draw(st.integers(0, 20)),
            in_place=source if in_place else None,
        )
        saved_so_far.update(b.nodes[-1][1])
        have.append(out)
    return b.backward("recorded step")


@st.composite
def literature_steps(draw: st.DrawFn, min_ops: int = 4, max_ops: int = 10) -> Program:
    """A step as the public graphs have it: forward and backward nodes, one output each, all may run again."""
    n = draw(st.integers(min_ops, max_ops))
    values, ops = [Value("x", 3, fixed=True)], list[Op]()
    inputs: list[tuple[int, ...]] = []
    for k in range(n):
        inputs.append(tuple({k, draw(st.integers(max(0, k - 3), k))}))
        values.append(Value(f"f{k}", draw(st.integers(1, 40))))
        ops.append(Op(f"f{k}", inputs[k], (k + 1,), draw(st.integers(0, 12)) / 4))
    grad = n
    for k in reversed(range(n)):
        values.append(Value(f"b{k}", draw(st.integers(1, 20))))
        ops.append(
            Op(f"b{k}", tuple(dict.fromkeys((grad, *inputs[k]))), (len(values) - 1,), draw(st.integers(0, 9)) / 4)
        )
        grad = len(values) - 1
    return Program("literature step", tuple(values), tuple(ops))


def steps() -> st.SearchStrategy[Program]:
    """Steps of either shape."""
    return st.one_of(recorded_steps(), literature_steps())
