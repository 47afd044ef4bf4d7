"""Program and budget in, plan out: one file, one algorithm. Never imports torch; numpy and scipy only when solving."""

from recollect.plan.budget import parse_budget
from recollect.plan.frontier import Frontier, frontier
from recollect.plan.portfolio import SOLVERS, solve

__all__ = ["SOLVERS", "Frontier", "frontier", "parse_budget", "solve"]
