"""One file, one algorithm: the folder is the list of solvers.

Every file has a function ``schedule``. The name of the solver is the file's, with hyphens.
"""

from __future__ import annotations

from importlib import import_module
from math import inf
from pkgutil import iter_modules
from typing import Final, Protocol

from autoremat.program import Program, Schedule

NAMES: Final = tuple(sorted(module.name.replace("_", "-") for module in iter_modules(__path__)))
"""All solvers, by name."""


class Solver(Protocol):
    """What ``schedule`` is in every file of this folder."""

    def __call__(self, program: Program, budget_bytes: int, *, deadline: float = inf) -> Schedule:
        """Make a schedule within the budget, or with the lowest peak.

        The latter is for an algorithm that has none within the budget.

        Args:
            program: the step, without calls that run again from their first op on (``planned_as`` has folded those).
            budget_bytes: of the peak.
            deadline: on ``clock.worked``; what takes long looks at it now and then, and ends with what it has.
        """


def solver_of(name: str) -> Solver:
    """Import the solver of a name.

    That happens at the first call, for importing autoremat is to be cheap.
    """
    found: Solver = import_module(f"{__name__}.{name.replace('-', '_')}").schedule
    return found
