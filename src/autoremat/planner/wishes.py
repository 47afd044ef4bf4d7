"""What a user wants kept or recomputed, whatever the planner thinks.

Wishes are patterns on modules and operators.

*Keep* says that what some ops make is never recomputed: these ops get a reason why they must not run again.
*Recompute* says that what some ops make does not stay from the forward into the backward: these values are *passing*,
their first residency ends at their last forward reader. So a program with wishes is a program like any other, and every
solver and bound knows what that means. Neither changes the numbers of ops and values: a schedule of the program with
wishes is one of the recorded program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Final

from autoremat.planner.refusals import with_message
from autoremat.program import InfeasibleBudget, Once, Op, Program, Schedule

Patterns = str | Sequence[str]
"""One pattern or several, such as ``"blocks.0.*"`` or ``"aten.bernoulli*"``."""


def _several(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


@dataclass(frozen=True)
class Wishes:
    """What a user wants of a plan beside its budget.

    A pattern (``fnmatch``) is held against the module path and the name of every op outside of the backward. It stands
    for what lies below it, too: ``blocks.0`` is ``blocks.0`` and ``blocks.0.mlp``, ``aten.mm`` is ``aten.mm.default``.

    Attributes:
        keep: patterns; what the ops that match make is never recomputed.
        recompute: patterns; what the ops that match make does not stay from the forward into the backward, and is
            recomputed where the backward asks for it. What must not run again stays all the same.

    Example:
        >>> Wishes(keep="blocks.0")
        Wishes(keep=('blocks.0',), recompute=())
        >>> bool(Wishes())
        False
    """

    keep: Patterns = ()
    recompute: Patterns = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _several(self.keep))
        object.__setattr__(self, "recompute", _several(self.recompute))

    def __bool__(self) -> bool:
        """Tell whether anything is wished for."""
        return bool(self.keep or self.recompute)

    def applied_to(self, program: Program) -> Program:
        """Return the program with the wishes, under the same numbers.

        O(patterns * ops).

        Raises:
            ValueError: a pattern matches no op, or, under ``recompute``, none that may run again; an op is matched by
                both.
        """
        if not self:
            return program
        kept, again = _matched(program, "keep", self.keep), _matched(program, "recompute", self.recompute)
        _refuse_both(program, kept & again)
        passing = {v for i in again if not program.ops[i].once for v in program.ops[i].writes}
        return replace(
            program,
            values=tuple(replace(x, passing=True) if v in passing else x for v, x in enumerate(program.values)),
            ops=tuple(replace(op, once=op.once or Once.KEPT) if i in kept else op for i, op in enumerate(program.ops)),
        )

    def explained(self, error: InfeasibleBudget) -> InfeasibleBudget:
        """Add a word on the wishes to an error."""
        if not self:
            return error
        said = [f"{name}={list(p)!r}" for name, p in (("keep", self.keep), ("recompute", self.recompute)) if p]
        return with_message(
            error,
            f"{error}\nThat is under the constraints {' and '.join(said)}: the floor may be lower with fewer of them.",
        )

    def still_possible(self, program: Program) -> Wishes:
        """Drop patterns that have turned out to ask the impossible.

        They are those of ``recompute`` that only match ops which must not run again.
        """
        may = [op for op in program.ops if not op.once]
        return replace(self, recompute=tuple(p for p in self.recompute if any(_matches(op, p) for op in may)))

    def keeps(self, module: str, name: str) -> bool:
        """Tell whether to keep an operator of this module and name."""
        return any(_fits(pattern, module, name) for pattern in self.keep)


NO_WISHES: Final = Wishes()


def kept_anyway(schedule: Schedule, passing: frozenset[int], until: Sequence[int]) -> frozenset[int]:
    """Find values whose first copy outlives the op ``until``.

    Up to there it is in memory whatever the plan. O(runs).
    """
    seen: set[int] = set()
    broken: set[int] = set()
    progress = -1
    for i, frees in zip(schedule.order, schedule.frees, strict=True):
        progress = max(progress, i)
        first = passing.intersection(frees) - seen
        seen |= first
        broken.update(v for v in first if progress > until[v])
    return frozenset(broken)


def _matched(program: Program, option: str, patterns: Patterns) -> frozenset[int]:
    """Find the ops that some pattern names."""
    early = [i for i, op in enumerate(program.ops) if op.phase != "backward"]
    found: set[int] = set()
    for pattern in patterns:
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
