"""Records a step as torch.compile traces it, and carries out plans in its graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from autoremat.engines.engine import Step
from autoremat.engines.torch.compiled.backends import named
from autoremat.engines.torch.compiled.beforehand import planned_beforehand
from autoremat.engines.torch.compiled.session import CompiledSession
from autoremat.planner import solve
from autoremat.planner.wishes import NO_WISHES, Wishes
from autoremat.program import Abilities, Plan, Program, simulate

BACKEND = "aot_eager"
"""The backend of ``torch.compile`` that runs a graph in the order in which it is written."""


@dataclass
class Given:
    """Stands for a user who has a plan, or, without one, keeps everything.

    Attributes:
        plan: that is to be carried out.
    """

    plan: Plan | None = None
    wishes: Wishes = NO_WISHES
    time_limit_seconds: float = 10.0
    effort: float | None = None
    optimizer: Any = None

    @property
    def budget(self) -> int | float:
        """The budget of the plan, as a user would give it."""
        return 1.0 if self.plan is None else self.plan.budget_bytes

    @property
    def settled_bytes(self) -> int | None:
        """Bytes that the budget has come to."""
        return None if self.plan is None else self.plan.budget_bytes

    def budget_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        """Return the budget in bytes."""
        return plain_peak_bytes if self.plan is None else self.plan.budget_bytes

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        """Return the given plan; keep everything where there is none."""
        return solve(program, simulate(program).peak_bytes) if self.plan is None else self.plan


class Compiled:
    """Writes a plan into the joint graph of a step; any op may be rerun anywhere."""

    name = "torch.compiled"
    abilities = Abilities()

    def record(self, step: Step) -> Program:
        """Record a step as the compiler traces it, without running it."""
        return planned_beforehand(step.fn, step.args, dict(step.kwargs), Given(), BACKEND).plan.program

    def carry_out(self, step: Step, plan: Plan) -> Callable[[], Any]:
        """Make a callable that runs the compiled step under a plan.

        Raises:
            ValueError: the plan is of another step.
        """
        program = self.record(step)
        if (program.ops, program.values) != (plan.program.ops, plan.program.values):
            raise ValueError(
                f"the plan is of {plan.program.name!r}, which has other operators or sizes than this step has as "
                "torch.compile traces it: plan this step itself (autoremat.plan(..., compiled=True))"
            )
        backend = CompiledSession(None, Given(plan)).backend(named(BACKEND), is_whole=True)

        def run(*args: Any, **kwargs: Any) -> Any:
            return step.fn(*args, **kwargs)

        compiled = torch.compile(run, backend=backend, fullgraph=True)
        return lambda: compiled(*step.args, **step.kwargs)


ENGINE = Compiled()
