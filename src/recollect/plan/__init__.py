"""Program and budget in, plan out: one file, one algorithm. Never imports torch; numpy and scipy only when solving."""

from recollect.plan.budget import parse_budget
from recollect.plan.frontier import Frontier, frontier
from recollect.plan.portfolio import SOLVERS, classics_of, solve

__all__ = ["SOLVERS", "Frontier", "classics_of", "frontier", "parse_budget", "solve"]
