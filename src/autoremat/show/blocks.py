"""What checkpointing by hand would free, module by module.

For some modules that is nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from autoremat.program import Program
from autoremat.program.units import format_bytes

_NEXT_TO_NOTHING: Final = 20
"""Freeing less than a twentieth of what a module saves is not worth its rerun."""


@dataclass(frozen=True, slots=True)
class Block:
    """A module as ``torch.utils.checkpoint`` would treat it.

    Only what enters and leaves it stays.

    Attributes:
        path: of the module.
        saved_bytes: what plain training saves for its backward.
        made_bytes: of those, what it makes itself.
        freed_bytes: of those, what no other backward reads and nothing else holds, so that it would leave.
        input_bytes: what enters it and would have to stay, although plain training does not save it.
        seconds: of one rerun of its forward.
    """

    path: str
    saved_bytes: int
    made_bytes: int
    freed_bytes: int
    input_bytes: int
    seconds: float

    @property
    def gain_bytes(self) -> int:
        """Count what checkpointing the module would free until the backward.

        It is negative where checkpointing would cost memory.
        """
        return self.freed_bytes - self.input_bytes

    @property
    def why_not(self) -> str:
        """Why checkpointing it is no good; "" where it does free memory."""
        saved, kept = format_bytes(self.saved_bytes), format_bytes(self.input_bytes)
        if self.gain_bytes * _NEXT_TO_NOTHING > self.saved_bytes or not self.saved_bytes:
            return ""
        if not self.made_bytes:
            return f"saves nothing, because all that it keeps for the backward ({saved}) is its input"
        if not self.freed_bytes:
            return f"saves nothing, because what it keeps ({saved}) is its input, or stays for the backward of others"
        if self.gain_bytes <= 0:
            return f"saves nothing, because its input ({kept}) would have to stay and is as large as what it keeps"
        gain = format_bytes(self.gain_bytes)
        return f"saves next to nothing ({gain} of {saved}), because most of what it keeps is its input"


def blocks_of(program: Program) -> tuple[Block, ...]:
    """List all modules of the forward in the order they run.

    They have ops there. O(reads x depth).
    """
    seconds: dict[str, float] = {}
    for op in program.ops:
        if op.phase == "forward":
            for path in _above(op.module):
                seconds[path] = seconds.get(path, 0.0) + op.again_seconds
    tables = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for v, value in enumerate(program.values):
        if not value.fixed:
            for table, paths in zip(tables, _roles(program, v), strict=True):
                table.update(dict.fromkeys(paths, value.nbytes))
    saved, made, freed, entering = tables
    return tuple(Block(p, saved[p], made[p], freed[p], entering[p], total) for p, total in seconds.items())


def useless_blocks(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Select blocks that checkpointing does no good, without those inside another."""
    useless = {b.path: b for b in blocks if b.why_not}
    return tuple(b for path, b in useless.items() if useless.keys().isdisjoint([*_above(path)][:-1]))


def _roles(program: Program, v: int) -> tuple[set[str], ...]:
    """Sort modules by what they do to a value.

    Those that save it, those of them that make it, that would free it; those it enters unsaved.
    """
    nothing: tuple[set[str], ...] = set(), set(), set(), set()
    home = program.ops[program.producer[v]]
    if home.phase == "backward":
        return nothing
    ops = [program.ops[i] for i in program.readers[v]]
    forward = {op.module for op in ops if op.phase == "forward"}
    backward = {op.module for op in ops if op.kind == "ask"} or {op.module for op in ops if op.phase == "backward"}
    if not backward:
        entered = set[str]().union(*map(_above, forward)).difference(_above(home.module))
        return nothing if _outlives_the_forward(program, v) else (set(), set(), set(), entered)
    saved = set[str]().union(*map(_above, backward))
    freed = set(_above(_common([home.module, *backward])))  # who reads it in the forward does not keep it
    may_leave = not home.once and not _outlives_the_forward(program, v)
    return saved, saved.intersection(_above(home.module)), freed if may_leave else set(), set()


def _outlives_the_forward(program: Program, v: int) -> bool:
    """Tell whether more than the backward holds the value beyond the forward.

    The question is put at the first op of the backward.
    """
    until = program.hold[v]
    return until >= 0 and program.ops[until].phase == "backward"


def _above(path: str) -> Iterator[str]:
    """List the module and those around it, outermost first.

    For ``a.b.c`` they are ``a``, ``a.b`` and ``a.b.c``.
    """
    parts = path.split(".") if path else []
    return (".".join(parts[: k + 1]) for k in range(len(parts)))


def _common(paths: Iterable[str]) -> str:
    """Find the innermost module around all of these."""
    levels = takewhile(lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False))
    return ".".join(parts[0] for parts in levels)
