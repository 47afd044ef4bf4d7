"""``torch.utils.checkpoint`` around every block: what people write by hand.

A block is a maximal run of consecutive forward ops below one numbered module (``blocks.3.mlp.0`` and ``blocks.3.norm``
are both in ``blocks.3``). Only what enters a block stays; at the first demand for anything inside, the block runs again
up to its last value that the backward reads (torch's "early stop"), and what that makes stays until its last use.
Ops outside of numbered modules do not run again. In a program without module paths every op is a block of its own.
"""

from __future__ import annotations

from math import inf

from autoremat.planner.search.tables import NEVER, Tables, tables_of
from autoremat.planner.search.unrolled import merge, reruns
from autoremat.program import Program, Schedule


def schedule(program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
    """Whatever the budget, the schedule of ``torch.utils.checkpoint`` around every numbered module. O(reads)."""
    tables = tables_of(program)
    blocks = block_of(tables)
    dropped = frozenset(v for v in tables.droppable if not _leaves_its_block(tables, blocks, v))
    runs = reruns(tables, (dropped,))
    return Schedule.from_order(program, merge(tables, runs + _rest_of_blocks(tables, blocks, runs)))


def block_of(tables: Tables) -> tuple[int, ...]:
    """Number the block of every op, -1 outside of blocks."""
    if not any(tables.ops[i].module for i in tables.early):
        return tuple(-1 if late else i for i, late in enumerate(tables.late))
    table, number, current = [-1] * len(tables.late), -1, ""
    for i in tables.early:
        prefix = _numbered_prefix(tables.ops[i].module)
        if prefix and prefix != current:
            number += 1
        current = prefix
        table[i] = number if prefix else -1
    return tuple(table)


def _numbered_prefix(module: str) -> str:
    """``blocks.3`` of ``blocks.3.mlp.0``, "" where no component is a number."""
    parts = module.split(".")
    for k, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: k + 1])
    return ""


def _leaves_its_block(tables: Tables, blocks: tuple[int, ...], value: int) -> bool:
    """Tell whether checkpointing would keep the value.

    It is made outside of blocks, or read by an op of another block.
    """
    home = blocks[tables.producer[value]]
    return home < 0 or any(blocks[i] != home for i in tables.early_readers[value])


def _rest_of_blocks(tables: Tables, blocks: tuple[int, ...], runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Add the reruns that demand alone would not ask for.

    Checkpointing runs a block as a whole.
    """
    when: dict[int, int] = {}
    last: dict[int, int] = {}
    for time, i in runs:
        when[blocks[i]] = min(time, when.get(blocks[i], NEVER))
        last[blocks[i]] = max(i, last.get(blocks[i], -1))
    asked = dict.fromkeys((i for _, i in runs), True)
    rest: list[tuple[int, int]] = []
    for i in tables.early:
        inside = blocks[i] in when and i < last[blocks[i]]
        if inside and i not in asked and tables.rerunnable[i] and _inputs_at_hand(tables, asked, i):
            rest.append((when[blocks[i]], i))
    return rest


def _inputs_at_hand(tables: Tables, asked: dict[int, bool], op: int) -> bool:
    gone = tables.passing
    return all((tables.keepable[v] and v not in gone) or tables.producer[v] in asked for v in tables.reads[op])
