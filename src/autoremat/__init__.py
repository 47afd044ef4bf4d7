"""autoremat: gradient checkpointing that plans itself.

Name a budget in bytes; autoremat records the training step, plans the cheapest recomputation whose peak stays within
the budget, and runs it with bit-identical gradients.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autoremat.planner import Wishes, solve
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, simulate, verify

if TYPE_CHECKING:
    from autoremat.api import checkpoint, explain, frontier, plan, restore, stats
    from autoremat.checking import check
    from autoremat.largest import max_batch

__version__ = "0.1.0"
__all__ = [
    "InfeasibleBudget",
    "Plan",
    "Program",
    "Schedule",
    "Wishes",
    "check",
    "checkpoint",
    "explain",
    "frontier",
    "max_batch",
    "plan",
    "restore",
    "simulate",
    "solve",
    "stats",
    "verify",
]

_NEED_TORCH = {
    **dict.fromkeys(("checkpoint", "explain", "frontier", "plan", "restore", "stats"), "autoremat.api"),
    "check": "autoremat.checking",
    "max_batch": "autoremat.largest",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something needs it.

    Programs, solvers and the verifier do without.
    """
    if name in _NEED_TORCH:
        try:
            value = getattr(import_module(_NEED_TORCH[name]), name)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "platformdirs"):
                raise
            raise ModuleNotFoundError(
                f"autoremat.{name} needs an engine, and {error.name} is not installed; run: pip install "
                "'autoremat[torch]'. Programs from files are planned without: autoremat.solve(autoremat.Program."
                "from_json(...), budget)",
                name=error.name,
            ) from error
        globals()[name] = value
        return value
    raise AttributeError(f"module 'autoremat' has no attribute {name!r}")
