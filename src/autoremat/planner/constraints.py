"""What a user wants kept or computed again, whatever the planner thinks: patterns on modules and operators.

*Keep* says that what some ops make is never computed again: these ops get a reason why they must not run again, and
every solver, bound and judge knows what that means. *Recompute* says that what some ops make does not stay from the
forward into the backward: its first residency ends at its last forward reader. No reason of an op can say that, so it
stands in ``Constrained`` and gets into ``Tables``. Neither changes the numbers of ops and values: a schedule of the
constrained program is one of the recorded program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from autoremat.planner.refusals import with_message
from autoremat.program import InfeasibleBudget, Once, Op, Program, Schedule

Patterns = str | Sequence[str]
"""One pattern or several, such as ``"blocks.0.*"`` or ``"aten.bernoulli*"``."""


@dataclass(frozen=True)
class Constrained(Program):
    """A program of which some values must not stay from the forward into the backward.

    Attributes:
        passing: these values. Each is made by an op that may run again.
    """

    passing: frozenset[int] = field(default=frozenset(), kw_only=True)

    @property
    def before(self) -> dict[int, int]:
        """For an op whose reruns include those of another, that other one; only folded programs have some."""
        return {}


def constrain(program: Program, keep: Patterns = (), recompute: Patterns = ()) -> Program:
    """The program with the user's wishes; the same ops and values under the same numbers. O(patterns * ops).

    A pattern (``fnmatch``) is held against the module path and the name of every op outside of the backward. It stands
    for what lies below it, too: ``blocks.0`` is ``blocks.0`` and ``blocks.0.mlp``, ``aten.mm`` is ``aten.mm.default``.
    What must not run again anyway stays, whatever ``recompute`` says of it.

    Raises:
        ValueError: a pattern matches no op, or, under ``recompute``, none that may run again; an op is matched by
            both.
    """
    kept, again = _matched(program, "keep", keep), _matched(program, "recompute", recompute)
    _refuse_both(program, kept & again)
    ops = tuple(replace(op, once=op.once or Once.KEPT) if i in kept else op for i, op in enumerate(program.ops))
    passing = frozenset(v for i in again if not program.ops[i].once for v in program.ops[i].writes)
    return Constrained(
        program.name, program.values, ops, timing=program.timing, passing=passing, abilities=program.abilities
    )


def passing_values(program: Program) -> frozenset[int]:
    """The values that must not stay from the forward into the backward; none in a program without constraints."""
    return program.passing if isinstance(program, Constrained) else frozenset()


def kept_anyway(schedule: Schedule, passing: frozenset[int], until: Sequence[int]) -> frozenset[int]:
    """The values whose first copy outlives the op ``until``, up to which it is in memory whatever the plan. O(runs)."""
    seen: set[int] = set()
    broken: set[int] = set()
    progress = -1
    for i, frees in zip(schedule.order, schedule.frees, strict=True):
        progress = max(progress, i)
        first = passing.intersection(frees) - seen
        seen |= first
        broken.update(v for v in first if progress > until[v])
    return frozenset(broken)


def explained(error: InfeasibleBudget, keep: Patterns, recompute: Patterns) -> InfeasibleBudget:
    """The error of a constrained program, with a word on the constraints."""
    wishes = [f"{name}={list(_several(p))!r}" for name, p in (("keep", keep), ("recompute", recompute)) if p]
    return with_message(
        error,
        f"{error}\nThat is under the constraints {' and '.join(wishes)}: the floor may be lower with fewer of them.",
    )


def still_possible(program: Program, recompute: Patterns) -> tuple[str, ...]:
    """The patterns that name some op which may run again; at run time, others have turned out not to be."""
    may = [op for op in program.ops if not op.once]
    return tuple(p for p in _several(recompute) if any(_matches(op, p) for op in may))


def is_matched(patterns: Patterns, module: str, name: str) -> bool:
    """Whether one of these patterns stands for an operator of this name in the module of this path."""
    return any(_fits(pattern, module, name) for pattern in _several(patterns))


def _several(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _matched(program: Program, option: str, patterns: Patterns) -> frozenset[int]:
    """The ops that some pattern names."""
    early = [i for i, op in enumerate(program.ops) if op.phase != "backward"]
    found: set[int] = set()
    for pattern in _several(patterns):
        hits = [i for i in early if _matches(program.ops[i], pattern)]
        if not hits:
            raise ValueError(_no_match(option, pattern, (program.ops[i] for i in early)))
        if option == "recompute" and all(program.ops[i].once for i in hits):
            raise ValueError(_never_again(pattern, program.ops[hits[0]]))
        found.update(hits)
    return frozenset(found)


def _matches(op: Op, pattern: str) -> bool:
    return _fits(pattern, op.module, op.name)


def _fits(pattern: str, module: str, name: str) -> bool:
    return any(fnmatchcase(n, p) for n in (module, name) for p in (pattern, f"{pattern}.*"))


def _no_match(option: str, pattern: str, ops: Iterable[Op]) -> str:
    names = list(dict.fromkeys(name for op in ops for name in (op.module, op.name) if name))
    near = get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
    known = f"near it: {', '.join(near)}" if near else "the program has no forward ops"
    return (
        f"{option}={pattern!r} matches no module and no operator of the forward; {known}. Patterns are those of "
        'fnmatch, such as "blocks.0.*" or "aten.bernoulli*"'
    )


def _never_again(pattern: str, op: Op) -> str:
    return (
        f"recompute={pattern!r} matches only ops that must not run again, such as {op.name}"
        f"{f' in {op.module}' if op.module else ''} ({op.why}); leave that pattern out"
    )


def _refuse_both(program: Program, both: frozenset[int]) -> None:
    if both:
        op = program.ops[min(both)]
        raise ValueError(
            f"keep and recompute both match {len(both)} op(s), such as {op.name}"
            f"{f' in {op.module}' if op.module else ''}; narrow one of the patterns"
        )
