"""Program and budget in, plan out: one file, one algorithm. Never imports torch; numpy and scipy only when solving."""

from recollect.plan.budget import parse_budget
from recollect.plan.portfolio import SOLVERS, solve

__all__ = ["SOLVERS", "parse_budget", "solve"]
