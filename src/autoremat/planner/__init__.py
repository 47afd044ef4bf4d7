"""Program and budget in, plan out. Never imports torch; numpy and scipy only when solving."""

from autoremat.planner.frontiers import Frontier, frontier
from autoremat.planner.solving import SOLVERS, classics_of, solve
from autoremat.program.units import parse_budget

__all__ = ["SOLVERS", "Frontier", "classics_of", "frontier", "parse_budget", "solve"]
