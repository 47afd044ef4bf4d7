"""Records steps of eager PyTorch, and carries out plans call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autoremat.engines.engine import Step
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.eager.options import Options
from autoremat.engines.torch.eager.session import Session
from autoremat.program import Abilities, Plan, Program


class Eager:
    """Reruns calls ahead of what the backward asks for.

    Gradients are those of plain training to the bit.
    """

    name = "torch.eager"
    abilities = Abilities("at asks")

    def record(self, step: Step) -> Program:
        """Record a step without running it."""
        return record(step.fn, step.args, step.kwargs)

    def carry_out(self, step: Step, plan: Plan) -> Callable[[], Any]:
        """Make a callable that runs the step's forward under a plan.

        A backward pass from its result follows the plan, too.
        """
        session = Session(step.fn, Options(plan.budget_bytes, None, (), (), time_limit_seconds=10.0, given=plan))
        return lambda: session.call(step.args, dict(step.kwargs))


ENGINE = Eager()
