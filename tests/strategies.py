"""Hypothesis strategies for small programs and for orders that really can run.

Use them as ``from tests.strategies import programs, orders`` (``tests`` is a package, run pytest from the root).
Sizes are small integers and seconds are multiples of 1/4, so that sums are exact in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import get_args

from hypothesis import strategies as st

from autoremat.program import Abilities, Once
from autoremat.program.abilities import Reruns
from autoremat.program.model import END, Op, Program, Value

SIZES = st.integers(0, 9)
SECONDS = st.integers(0, 8).map(lambda quarters: quarters / 4)


@dataclass
class _Builder:
    """Collects values and ops while a program is drawn."""

    draw: st.DrawFn
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def value(self, prefix: str, **fields: object) -> int:
        self.values.append(Value(f"{prefix}{len(self.values)}", self.draw(SIZES), **fields))  # type: ignore[arg-type]
        return len(self.values) - 1

    def op(self, name: str, reads: tuple[int, ...], writes: tuple[int, ...], **fields: object) -> int:
        costs = {"seconds": self.draw(SECONDS), "scratch_bytes": self.draw(st.sampled_from((0, 0, 0, 1, 5)))} | fields
        self.ops.append(Op(name, reads, writes, **costs))  # type: ignore[arg-type]
        return len(self.ops) - 1

    def some(self, of: list[int], at_most: int = 2) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(st.sampled_from(of), min_size=1, max_size=at_most, unique=True)))

    def program(self, name: str) -> Program:
        return Program(name, tuple(self.values), tuple(self.ops))


@st.composite
def literature_programs(draw: st.DrawFn, min_ops: int = 1, max_ops: int = 8) -> Program:
    """A directed acyclic graph as in the literature: every node one output, all of them may run again."""
    b = _Builder(draw)
    have = [b.value("x", fixed=True)]
    for i in range(draw(st.integers(min_ops, max_ops))):
        reads = b.some(have, at_most=3)
        have.append(b.value("v"))
        b.op(f"node{i}", reads, (have[-1],))
    b.values[-1] = replace(b.values[-1], held=END)
    return b.program("literature")


@st.composite
def recorded_programs(draw: st.DrawFn, min_forward: int = 1, max_forward: int = 5) -> Program:
    """A training step as it is recorded: in-place ops, several outputs, held values, unpack ops, a backward."""
    b = _Builder(draw)
    x, weight = b.value("x", fixed=True), b.value("w", fixed=True)
    have, saved, grads = [x], [], []
    for i in range(draw(st.integers(min_forward, max_forward))):
        keep = _forward_op(b, i, have, weight, saved)
        saved.append(keep)
    _hold_some(b)
    loss = b.values[have[-1]]
    b.values[have[-1]] = replace(loss, held=END)
    grad = b.value("g")
    b.op("ones", (), (grad,), phase="backward", once=Once.BACKWARD)
    for i, keep in reversed(list(enumerate(saved))):
        for v in keep:
            b.op("unpack", (v,), (), seconds=0.0, scratch_bytes=0, phase="backward", once=Once.BACKWARD, kind="ask")
        before, grad = grad, b.value("g")
        grads.append(b.value("dw", held=END, kind="gradient"))
        b.op(f"f{i}.backward", (*keep, before), (grad, grads[-1]), phase="backward", once=Once.BACKWARD)
    return b.program("recorded")


def _forward_op(b: _Builder, i: int, have: list[int], weight: int, saved: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Append one forward op; ``have`` loses what is overwritten. Returns the values saved for the backward."""
    once = b.draw(st.sampled_from((None, None, None, Once.GIVEN)))
    keepable = {v for keep in saved for v in keep}
    if have[-1] not in keepable and not b.values[have[-1]].fixed and b.draw(st.booleans()):
        old, new = have.pop(), b.value("a")
        b.values[new] = replace(b.values[new], nbytes=b.values[old].nbytes)
        b.op(f"f{i}_", (old, *b.some([*have, weight], 1)), (new,), once=once, in_place=((new, old),))
        have.append(new)
        return (new,) if b.draw(st.booleans()) else ()
    reads = b.some([*have[-3:], weight])
    writes = tuple(b.value("a") for _ in range(b.draw(st.sampled_from((1, 1, 1, 2)))))
    b.op(f"f{i}", reads, writes, once=once)
    have.extend(writes)
    return b.some([*reads, *writes[:1]]) if b.draw(st.booleans()) else ()


def _hold_some(b: _Builder) -> None:
    """Let Python hold some of the values for a while, not beyond the op that overwrites them."""
    last = len(b.ops) - 1
    overwritten = {old: i for i, op in enumerate(b.ops) for _, old in op.in_place}
    for i, op in enumerate(b.ops):
        for v in op.writes:
            if b.draw(st.sampled_from((False, False, True))):
                held = b.draw(st.integers(i, min(overwritten.get(v, last), last)))
                b.values[v] = replace(b.values[v], held=held)


def programs(max_ops: int = 5) -> st.SearchStrategy[Program]:
    """Small programs of either shape; ``max_ops`` bounds the ops of the graph or of the forward."""
    return st.one_of(literature_programs(max_ops=max_ops), recorded_programs(max_forward=max_ops))


def abilities() -> st.SearchStrategy[Abilities]:
    """What engines can do, in every way a program can say it."""
    return st.builds(Abilities, reruns=st.sampled_from(get_args(Reruns)), most_runs=st.sampled_from((None, 1, 2)))


@st.composite
def orders(draw: st.DrawFn, program: Program, max_extra: int = 3) -> tuple[int, ...]:
    """An order in which the program can run: the ops in program order, with up to ``max_extra`` further runs.

    A further run is drawn only where everything that the op reads has been written and has not been overwritten in
    place by a first run since. So ``Schedule.from_order`` of it is always valid.
    """
    order: list[int] = []
    available = {v for v, value in enumerate(program.values) if value.fixed}
    gaps = draw(st.lists(st.integers(0, len(program.ops)), max_size=max_extra).map(sorted))
    for i in range(len(program.ops) + 1):
        for _ in range(gaps.count(i)):
            again = [k for k, op in enumerate(program.ops[:i]) if not op.once and available.issuperset(op.reads)]
            if again:
                k = draw(st.sampled_from(again))
                order.append(k)
                available.update(program.ops[k].writes)
        if i < len(program.ops):
            order.append(i)
            available.update(program.ops[i].writes)
            available.difference_update(old for _, old in program.ops[i].in_place)
    return tuple(order)
