"""Program and budget in, plan out: one file, one algorithm. Never imports torch; numpy and scipy only when solving."""

from autoremat.plan.budget import parse_budget
from autoremat.plan.frontier import Frontier, frontier
from autoremat.plan.portfolio import SOLVERS, classics_of, solve

__all__ = ["SOLVERS", "Frontier", "classics_of", "frontier", "parse_budget", "solve"]
