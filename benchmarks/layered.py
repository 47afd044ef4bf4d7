"""Random layered graphs, all of whose ops may run again: how far the plans are from the bound, and at what effort.

Graphs of the kind on which Moccasin was measured (Bartan et al. 2023, "Moccasin: Efficient Tensor Rematerialization for
Neural Networks", ICML): nodes in layers, every node reads one of the layer before it, further edges lead to later
layers, near and far; 100, 250, 500 and 1,000 nodes with as many edges as theirs. There is no backward: values are read
long after they were made all along the program, and memory has no one peak. Sizes and durations are drawn evenly.

Budgets are shares of the plain peak. Effort is what ``solve`` is asked for: the table is the same on every machine, but
for the seconds, which are those of the processor. The last column is what a plan says that ended early.
Run: ``python benchmarks/layered.py [NODES ...]``; some minutes.
"""

from __future__ import annotations

import random
import sys
import time
from itertools import pairwise

from autoremat import InfeasibleBudget, solve
from autoremat.planner.search.floor import floor_of
from autoremat.planner.solving import LIMIT_SECONDS
from autoremat.program import END, Op, Program, Value, simulate

EDGES = {100: 236, 250: 944, 500: 2461, 1000: 5875}
"""Edges by nodes."""

SECONDS = {100: 10.0, 250: 10.0, 500: 30.0, 1000: 60.0}
"""Limits of time by nodes; they set the effort."""

SHARES = (0.9, 0.85, 0.8, 0.75)


def layered_graph(n: int, seed: int) -> Program:
    """A random layered graph; the last layer stays to the end. O(edges)."""
    dice = random.Random(seed)
    layers = _layers(n, dice)
    home = [k for k, layer in enumerate(layers) for _ in layer]
    reads: list[set[int]] = [set() for _ in range(n)]
    for before, layer in pairwise(layers):
        for j in layer:
            reads[j].add(dice.choice(before))
        used = {i for j in layer for i in reads[j]}
        for i in before:
            if i not in used:
                reads[dice.choice(layer)].add(i)
    _add_edges(reads, layers, home, dice)
    kept = set(layers[-1])
    values = [Value(f"v{i}", 1000 * dice.randint(1, 100), held=END if i in kept else None) for i in range(n)]
    seconds = [dice.randint(1, 100) for _ in range(n)]
    ops = [Op("node", tuple(sorted(reads[i])), (i,), seconds[i] / sum(seconds)) for i in range(n)]
    return Program(f"layered, {n} nodes, seed {seed}", tuple(values), tuple(ops))


def _layers(n: int, dice: random.Random) -> list[list[int]]:
    """Nodes by layer: about half of sqrt(n) each."""
    width, layers, begin = max(2, round(n**0.5 / 2)), list[list[int]](), 0
    while begin < n:
        end = min(n, begin + dice.randint(max(1, width // 2), width * 3 // 2))
        layers.append(list(range(begin, end)))
        begin = end
    return layers


def _add_edges(reads: list[set[int]], layers: list[list[int]], home: list[int], dice: random.Random) -> None:
    """Edges to later layers, every other one to one of the next three, as many as there are to be."""
    n, last = len(reads), len(layers) - 1
    missing = EDGES.get(n, round(2.4 * n * (n / 100) ** 0.4)) - sum(map(len, reads))
    while missing > 0 and last > 0:
        i = dice.randrange(n - len(layers[last]))
        k = home[i] + (dice.randint(1, 3) if dice.random() < 0.5 else dice.randint(1, last - home[i]))
        j = dice.choice(layers[min(k, last)])
        missing -= i not in reads[j]
        reads[j].add(i)


def row_of(program: Program, share: float, limit: float) -> str:
    """Plan, bound, floor, effort and seconds at one budget."""
    plain, begin, effort = simulate(program).peak_bytes, time.process_time(), limit / LIMIT_SECONDS
    try:
        plan = solve(program, share, time_limit_seconds=1e6, effort=effort)
        found = f"{plan.overhead:9.3%} {plan.lower_bound:9.3%} {100 * (plan.overhead - plan.lower_bound):6.2f}"
        by, stopped = plan.solver, plan.stopped
    except InfeasibleBudget:
        found, by, stopped = f"{'-':>9s} {'-':>9s} {'-':>6s}", "", "below the floor"
    seconds, floor = time.process_time() - begin, floor_of(program).nbytes / plain
    return f"{share:6.0%} {found} {floor:6.1%} {effort:6.1f} {seconds:7.1f}  {by:10s} {stopped}"


def main(sizes: list[int]) -> None:
    """Print the table."""
    print(f"{'nodes':>5s} {'seed':>4s} {'budget':>6s} {'extra':>9s} {'bound':>9s} {'gap':>6s} {'floor':>6s} "
          f"{'effort':>6s} {'seconds':>7s}  by")  # fmt: skip
    for n in sizes or list(EDGES):
        for seed in (1, 2):
            program = layered_graph(n, seed)
            for share in SHARES:
                print(f"{n:5d} {seed:4d} {row_of(program, share, SECONDS.get(n, 60.0))}", flush=True)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]])
