"""The engine for JAX: a function and its gradient, carried out as code for XLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoremat.engines.jax.planning import Asked
from autoremat.engines.jax.steps import record_step
from autoremat.engines.jax.variants import Planned, Variants
from autoremat.engines.jax.wrapping import checkpointed
from autoremat.program import Abilities, Plan, Program


@dataclass(frozen=True)
class Step:
    """A step: a function that returns a number, what it is given, and what to differentiate.

    Attributes:
        fn: the function.
        args: its arguments, or their types and shapes.
        argnums: positions of those that it is differentiated with respect to.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    argnums: int | Sequence[int] = 0


@dataclass(frozen=True)
class Given(Asked):
    """A plan, in place of wishes for one."""

    plan: Plan | None = None

    def planned(self, variants: Variants) -> Planned:
        """The plan, with the recording of the step that it is one of.

        Raises:
            ValueError: it is of another one.
        """
        assert self.plan is not None
        for price in variants.prices():
            recorded = variants.at(price)
            if (recorded.program.ops, recorded.program.values) == (self.plan.program.ops, self.plan.program.values):
                return Planned(recorded, self.plan)
        raise ValueError(
            f"the plan is of {self.plan.program.name!r} with other operations or sizes than "
            f"{variants.plain.program.name!r} has here: plan this step itself (autoremat.jax.plan), with arguments of "
            "these shapes"
        )


class Jax:
    """Writes a plan into the function's gradient; XLA orders runs within what the plan's fences allow."""

    name = "jax"
    abilities = Abilities(ordered=False)

    def record(self, step: Step) -> Program:
        """The program of a step, on types and shapes."""
        return record_step(step.fn, step.args, {}, step.argnums).plain.program

    def carry_out(self, step: Step, plan: Plan) -> Callable[..., Any]:
        """A function that returns the step's number and gradients, to be compiled by ``jax.jit``.

        Without arguments it takes those of the step. A plan of another step is refused when the function is traced.
        """
        run = jax.value_and_grad(checkpointed(step.fn, Given(plan.budget_bytes, plan=plan)), step.argnums)
        return lambda *args: run(*(args or step.args))


ENGINE = Jax()
