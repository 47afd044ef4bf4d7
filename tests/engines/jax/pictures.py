"""What a plan keeps and computes again, layer by layer, whichever framework the program comes from."""

from __future__ import annotations

from collections.abc import Sequence

from autoremat.program import Plan, Program


def picture(plan: Plan, layers: Sequence[str]) -> list[str]:
    """A line for each run of a layer: ``A2 again .##.`` where the activations of A2 and A3 are in memory behind it."""
    program, order = plan.program, plan.schedule.order
    made_by = _activations(program, layers)
    lines, seen, memory = list[tuple[str, str]](), set[int](), set[int]()
    for position, i in enumerate(order):
        op = program.ops[i]
        memory.update(op.writes)
        memory.difference_update(plan.schedule.frees[position])
        what = "backward" if op.phase == "backward" else "again" if i in seen else "forward"
        seen.add(i)
        if _layer(op.module) in made_by:
            run = f"{_layer(op.module)} {what}"
            there = "".join("#" if made_by[layer] in memory else "." for layer in layers[:-1])
            lines = lines[:-1] if lines and lines[-1][0] == run else lines
            lines.append((run, there))
    return [" ".join(line) for line in lines]


def _activations(program: Program, layers: Sequence[str]) -> dict[str, int]:
    """For each layer what its last op of the forward makes."""
    made = {_layer(op.module): op.writes[-1] for op in program.ops if op.phase == "forward"}
    return {layer: made[layer] for layer in layers}


def _layer(module: str) -> str:
    return module.rpartition(".")[2]
