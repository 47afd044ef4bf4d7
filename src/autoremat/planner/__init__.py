"""Program and budget in, plan out.

Never imports torch; numpy and scipy only when solving.
"""

from autoremat.planner.frontiers import Frontier, frontier
from autoremat.planner.solving import SOLVERS, classics_of, solve
from autoremat.planner.wishes import Wishes
from autoremat.program.units import parse_budget

__all__ = ["SOLVERS", "Frontier", "Wishes", "classics_of", "frontier", "parse_budget", "solve"]
