"""Budget to plan, while JAX traces: the same program is planned once, however often it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from autoremat.engines.jax.variants import Planned, Variants
from autoremat.planner import solve
from autoremat.planner.wishes import NO_WISHES, Wishes
from autoremat.program import InfeasibleBudget, Plan, Program, simulate
from autoremat.program.units import Budget

Given = int | float | str
"""What a budget may be given as."""
_REMEMBERED: Final = 32


@dataclass(frozen=True)
class Asked:
    """What a user asks of a plan.

    Attributes:
        budget: of the peak; None: as much as ``fit`` allows.
        wishes: what is kept or computed again, whatever the planner thinks.
        time_limit_seconds: the longest that planning may take.
        effort: how much work it is worth, as for ``solve``.
    """

    budget: Given | None = None
    wishes: Wishes = NO_WISHES
    time_limit_seconds: float = 10.0
    effort: float | None = None

    def solve(self, program: Program, nbytes: int) -> Plan:
        """The plan of a program within so many bytes.

        Raises:
            InfeasibleBudget: no known plan fits.
        """
        key = program, nbytes, self.wishes, self.effort
        if key not in _PLANS:
            while len(_PLANS) >= _REMEMBERED:
                _PLANS.pop(next(iter(_PLANS)))
            _PLANS[key] = solve(
                program, nbytes, wishes=self.wishes, time_limit_seconds=self.time_limit_seconds, effort=self.effort
            )
        return _PLANS[key]


_PLANS: dict[tuple[Program, int, Wishes, float | None], Plan] = {}


def budget_bytes(budget: Given, program: Program) -> int:
    """Bytes of a budget. A share is one of what plain training takes.

    Raises:
        ValueError: a budget that cannot be read, or ``"auto"``: JAX does not say what a device has left to give.
    """
    return Budget.read(budget).in_bytes(simulate(program).peak_bytes)


@dataclass
class Allowance:
    """What ``fit`` allows the checkpointed functions of a step while it is traced.

    Attributes:
        share: of what each of them takes beside what is there all the time; 1 is plain training.
        plans: what was planned, in the order of tracing.
        is_at_the_floor: whether every plan is the smallest there is.
    """

    share: float
    plans: list[Plan] = field(default_factory=list)
    is_at_the_floor: bool = True

    def planned(self, variants: Variants, asked: Asked) -> Planned:
        """The plan that is allowed, or the smallest that there is."""
        program = variants.plain.program
        plain = simulate(program).peak_bytes
        nbytes = program.fixed_bytes + int(self.share * (plain - program.fixed_bytes))
        try:
            found = variants.planned(nbytes, asked.solve)
        except InfeasibleBudget as error:
            found = variants.planned(error.floor_bytes, asked.solve)
            self.is_at_the_floor &= True
        else:
            self.is_at_the_floor = False
        self.plans.append(found.plan)
        return found


_ALLOWANCE: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


def is_fitting() -> bool:
    """Whether ``fit`` is at work."""
    return _ALLOWANCE.get() is not None


@contextmanager
def allowed(allowance: Allowance) -> Iterator[None]:
    """Have checkpointed functions ask ``fit`` what they may take."""
    token = _ALLOWANCE.set(allowance)
    try:
        yield
    finally:
        _ALLOWANCE.reset(token)


def planned(variants: Variants, asked: Asked) -> Planned:
    """The plan of a step: within what ``fit`` allows, or within the user's budget.

    Raises:
        InfeasibleBudget: no known plan fits.
        ValueError: there is no budget.
    """
    allowance = _ALLOWANCE.get()
    if allowance is not None:
        return allowance.planned(variants, asked)
    program = variants.plain.program
    if asked.budget is None:
        raise ValueError(
            f"{program.name} is checkpointed without a budget, which only autoremat.jax.fit can find: give one "
            '(autoremat.jax.checkpoint(fn, budget="10GiB")), or compile the train step with autoremat.jax.fit'
        )
    return variants.planned(budget_bytes(asked.budget, program), asked.solve)
