"""The engine for eager PyTorch: steps of callables, recorded on fake tensors, carried out call by call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.eager.options import Options
from autoremat.engines.torch.eager.session import Session
from autoremat.program import Abilities, Plan, Program


@dataclass(frozen=True)
class Step:
    """A step: a module or callable that returns its loss or outputs, and what it is given."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Eager:
    """Runs calls again ahead of what the backward asks for, and gives the gradients of plain training to the bit."""

    name = "torch.eager"
    abilities = Abilities("at asks")

    def record(self, step: Step) -> Program:
        """The program of a step, which is not run."""
        return record(step.fn, step.args, step.kwargs)

    def carry_out(self, step: Step, plan: Plan) -> Callable[[], Any]:
        """A callable that runs the step's forward; its result has the graph of the plan's backward."""
        session = Session(step.fn, Options(plan.budget_bytes, None, (), (), time_limit_seconds=10.0, given=plan))
        return lambda: session.call(step.args, dict(step.kwargs))


ENGINE = Eager()
