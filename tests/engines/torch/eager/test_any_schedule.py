"""Whatever runs again and when: a schedule that ``verify`` accepts is carried out in the bytes that ``simulate`` says.

Solvers make reasonable schedules; these make calls again at random, also what is still there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.planner.search.account import Accountant
from autoremat.planner.search.calls import folded_of
from autoremat.planner.search.tables import tables_of
from autoremat.program import Plan, Program, Schedule, simulate, verify
from autoremat.program.lifetimes import Lifetimes, block_ends
from tests.engines.torch.follow import following, recorded
from tests.fixed import is_thorough, random_seed

Step = tuple[list[Tensor], Callable[[], Tensor]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def attention() -> Step:
    """Composite: its products save what earlier operators of the same call have made."""
    q, k, v = leaf(2, 2, 16, 8), leaf(2, 2, 16, 8), leaf(2, 2, 16, 8)

    def step() -> Tensor:
        a, b, c = q.tanh(), k.sin(), v.cos()
        x = F.scaled_dot_product_attention(a * 2, b.exp(), c + 1, dropout_p=0.1)
        return (F.scaled_dot_product_attention(x, a, b, is_causal=True) * x).sum()

    return [q, k, v], step


def half_precision() -> Step:
    """Every product casts what it is given, and the casts are saved."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8)
    )
    x = torch.randn(24, 16)

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = model(x)
            return (h @ h.mT).float().square().sum()

    return [x, *model.parameters()], step


def bilinear() -> Step:
    """Products of one value with itself, and of a value with what is made of it."""
    w = leaf(12, 12)

    def step() -> Tensor:
        a = w.tanh()
        b = a @ a
        c = torch.bmm(b[None], (b * a)[None])[0]
        d = F.bilinear(c, b, leaf_weight)
        return (d * d * c.sum()).sum()

    leaf_weight = leaf(3, 12, 12)
    return [w, leaf_weight], step


def overwriting() -> Step:
    """In place, dropout, normalisation."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Conv2d(4, 4, 3)
    )
    x = torch.randn(2, 2, 10, 10)
    return [x, *model.parameters(), *model.buffers()], lambda: model(x).sigmoid_().log().sum()


STEPS = {f.__name__: f for f in (attention, half_precision, bilinear, overwriting)}


def schedules(program: Program, seed: int, count: int) -> list[Schedule]:
    """Schedules with random further runs before unpacks that ``verify`` accepts."""
    draw, found = random.Random(seed), list[Schedule]()
    folded = folded_of(program)
    tables, accountant = tables_of(folded), Accountant(folded)
    asks = [i for i, op in enumerate(folded.ops) if op.kind == "ask"]
    while len(found) < count:
        share = draw.choice((0.02, 0.1, 0.3))
        runs = [(t, i) for t in asks for i in sorted(tables.replayed) if draw.random() < share]
        order = useful(program, folded.unfold([int(i) for i in accountant.order(runs)]))
        schedule = Schedule.from_order(program, order)
        if not verify(program, schedule):
            found.append(schedule)
    return found


def useful(program: Program, order: list[int]) -> list[int]:
    """The order with no call going on when all has been made that is read; nobody carries the rest out."""
    while True:
        ends = block_ends(program, order)
        first = {i: p for p, i in reversed(list(enumerate(order)))}
        passing = Lifetimes(program, order, first).passing
        read, needed = set[int](), dict[int, int]()
        for p in range(len(order) - 1, -1, -1):
            op, again = program.ops[order[p]], first[order[p]] < p
            lasting = [v for v in op.writes if (p, v) not in passing]
            for v in read.intersection(lasting) if again else ():
                needed[ends[p]] = max(needed.get(ends[p], -1), program.available[v])
            read.difference_update(lasting)
            inside = {v for q in range(p) if again and ends[q] == ends[p] for v in program.ops[order[q]].writes}
            read.update(v for v in op.reads if v not in inside)
        left = [i for p, i in enumerate(order) if first[i] == p or needed.get(ends[p], -1) >= i]
        if len(left) == len(order):
            return left
        order = left


def plan_of(program: Program, schedule: Schedule) -> Plan:
    timeline, plain = simulate(program, schedule), simulate(program)
    peak = timeline.peak_bytes
    overhead = timeline.extra_seconds / program.seconds
    return Plan(program, schedule, peak, peak, plain.peak_bytes, peak, overhead, 0.0, "at random")


@pytest.mark.one_in(4, guard=True)
@pytest.mark.parametrize("name", STEPS)
def test_carried_out_in_the_bytes_that_were_counted(name: str) -> None:
    carry_out_at_random(name)


def test_another_thread_takes_no_bytes() -> None:
    """While one is alive, it is made sure that reruns draw the numbers of the first run: without any memory."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        carry_out_at_random("attention")
    finally:
        over.set()
        other.join()


def carry_out_at_random(name: str) -> None:
    tensors, step = STEPS[name]()
    leaves = [t for t in tensors if t.requires_grad]
    program, path = recorded(step, timing="measure")
    asked = schedules(program, random_seed(0), 60 if is_thorough() else 12)
    before = resident(*tensors)

    def run(forward: Callable[[], Tensor]) -> tuple[int, list[Tensor]]:
        for t in leaves:
            t.grad = None
        torch.manual_seed(3)
        peak = account(lambda: forward().backward(), before).peak_bytes
        return peak, [t.grad.clone() for t in leaves]

    def followed(tape) -> Tensor:
        with tape.forward():
            return step()

    _, plain = run(step)
    for schedule in asked:
        tape = following(plan_of(program, schedule), path)
        peak, gradients = run(lambda tape=tape: followed(tape))
        assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
        assert peak == simulate(program, schedule).peak_bytes, schedule.order
