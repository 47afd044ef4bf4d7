"""Record the programs of the public benchmark into ``benchmarks/programs``; those that are there stay as they are.

Chains, an unrolled recurrence and random layered graphs are written down here; training graphs of known networks come
from ``training_graphs.py``; the others are recorded steps: the networks of the tests, those of Chen et al., and the
models of ``zoo_models.py`` whose libraries are installed. Seconds are estimated, so that they are the same on every
machine. Paths of source files are left out.
Run: ``python benchmarks/record_programs.py [NAME ...]``; some minutes. Then ``autoremat bench auto --by ...``.
"""

from __future__ import annotations

import importlib.util
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from autoremat.bench.catalog import Catalog
from autoremat.engines.torch.eager.dry_run import record
from autoremat.program import END, InvalidProgram, Op, Program, Value
from benchmarks.chen import resnet1001
from benchmarks.layered import layered_graph
from benchmarks.strategies import gpt24, of_the_zoo, resnet50
from benchmarks.training_graphs import NETWORKS, training_graph
from benchmarks.zoo_models import ZOO, Specimen
from tests.zoo import CASES

FOLDER = Path(__file__).parent / "programs"
MOST_OPS = 3000
"""Models of the zoo with more operators are left out."""


def chain(n: int, *, seed: int | None = None) -> Program:
    """Forward and backward of ``n`` layers, the backward of each reading its input; equal, or drawn by ``seed``."""
    dice = random.Random(seed)
    sizes = [1 << 20 if seed is None else 1024 * dice.randint(64, 2048) for _ in range(n + 1)]
    seconds = [1e-3 if seed is None else 1e-5 * dice.randint(10, 200) for _ in range(n)]
    values = [Value("x0", sizes[0], fixed=True), *(Value(f"x{k}", sizes[k]) for k in range(1, n + 1))]
    ops = [Op("layer", (k,), (k + 1,), seconds[k]) for k in range(n)]
    for k in reversed(range(n)):
        values.append(Value(f"g{k}", sizes[k], held=END if k == 0 else None))
        reads = (k, k + 1, len(values) - 2) if k < n - 1 else (k, k + 1)
        ops.append(Op("layer_backward", reads, (len(values) - 1,), 2 * seconds[k], phase="backward"))
    return Program("", tuple(values), tuple(ops))


def recurrence(steps: int, layers: int = 2) -> Program:
    """Layers of cells unrolled over time, a loss at every step; the backward of a cell reads all that it read."""
    values, ops = [Value("weights", 1 << 20, fixed=True)], list[Op]()
    state: dict[tuple[int, int], int] = {}

    def write(name: str, nbytes: int, reads: list[int], seconds: float, phase: str) -> int:
        values.append(Value(f"{name}.{len(values)}", nbytes))
        ops.append(Op(name, tuple(reads), (len(values) - 1,), seconds, phase=phase))
        return len(values) - 1

    for t in range(steps):
        for k in range(layers):
            before = [state[s] for s in ((t - 1, k), (t, k - 1)) if s in state]
            state[t, k] = write("cell", 1 << 16, [0, *before], 1e-4, "forward")
        state[t, layers] = write("loss", 1 << 12, [state[t, layers - 1]], 2e-5, "forward")
    grads: dict[tuple[int, int], int] = {}
    for t in reversed(range(steps)):
        for k in reversed(range(layers + 1)):
            inputs = [state[s] for s in ((t - 1, k), (t, k - 1)) if s in state]
            later = [grads[s] for s in ((t + 1, k), (t, k + 1)) if s in grads]
            name, nbytes = ("cell_backward", 1 << 16) if k < layers else ("loss_backward", 1 << 12)
            grads[t, k] = write(name, nbytes, [*inputs, state[t, k], *later], 2e-4, "backward")
    return Program("", tuple(values), tuple(ops))


def of_specimen(specimen: Specimen) -> Program:
    """The step of a model of the zoo."""
    torch.manual_seed(0)
    model = specimen.model()
    inputs = specimen.inputs()
    return record(lambda: specimen.loss(model(**inputs)), timing="estimate", name=specimen.name)


def programs() -> Iterator[tuple[str, str, str, Callable[[], Program]]]:
    """Name, title, kind and how to make it."""
    yield from (
        ("chain-32", "chain, 32 equal layers", "chain", lambda: chain(32)),
        ("chain-128", "chain, 128 equal layers", "chain", lambda: chain(128)),
        ("chain-uneven-32", "chain, 32 uneven layers", "chain", lambda: chain(32, seed=1)),
        ("chain-uneven-128", "chain, 128 uneven layers", "chain", lambda: chain(128, seed=2)),
        ("recurrence-32", "recurrence, 2 layers, 32 steps", "unrolled", lambda: recurrence(32)),
        ("recurrence-256", "recurrence, 2 layers, 256 steps", "unrolled", lambda: recurrence(256)),
        ("gpt-24", "GPT, 24 blocks", "recorded", gpt24),
        ("resnet-50", "ResNet-50", "recorded", resnet50),
        ("resnet-1001", "ResNet, 1,001 layers", "recorded", resnet1001),
    )
    for n, seed in ((100, 1), (100, 2), (250, 1), (250, 2), (500, 1), (1000, 1)):
        title = f"layered, {n} nodes, seed {seed}"
        yield f"layered-{n}-{seed}", title, "layered", lambda n=n, seed=seed: layered_graph(n, seed)
    for name, make in NETWORKS.items():
        yield _file_name(f"graph {name}"), name, "training graph", lambda make=make: training_graph("", make())
    for case in CASES:
        yield _file_name(f"test {case}"), str(case), "recorded", of_the_zoo(case)
    for specimen in ZOO:
        if importlib.util.find_spec(specimen.library):
            name = _file_name(f"{specimen.library} {specimen.name}")
            title = f"{specimen.name} ({specimen.library})"
            yield name, title, f"zoo, {specimen.kind}", lambda s=specimen: of_specimen(s)


def _file_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def without_sources(program: Program, title: str) -> Program:
    """The program under its title, without what takes room and says nothing to a solver."""
    ops = tuple(replace(op, source="") for op in program.ops)
    values = tuple(replace(v, id=f"v{k}", label="", dtype="", shape=None) for k, v in enumerate(program.values))
    return replace(program, name=title, values=values, ops=ops)


def main(names: list[str]) -> None:
    """Record what is missing."""
    catalog = Catalog.at(FOLDER)
    for name, title, kind, make in programs():
        if name in catalog.names or (names and name not in names):
            continue
        begin = time.perf_counter()
        try:
            program = without_sources(make(), title)
        except (InvalidProgram, RuntimeError, ValueError, TypeError, AttributeError) as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        if len(program.ops) > MOST_OPS and kind.startswith("zoo"):
            print(f"{name}: left out, {len(program.ops)} operators", flush=True)
            continue
        catalog = catalog.with_program(name, kind, program)
        print(f"{name}: {len(program.ops)} operators, {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
