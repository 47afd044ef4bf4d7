"""Budget to plan, while JAX traces: the same program is planned once, however often it is traced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final, TypeVar

import jax

from autoremat.engines.jax.variants import Planned, Variants
from autoremat.planner import solve
from autoremat.planner.search.floor import floor_of
from autoremat.planner.wishes import NO_WISHES, Wishes
from autoremat.program import InfeasibleBudget, Link, Plan, Program, simulate
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
        link: to a slower tier, where values may be moved.
        effort: how much work it is worth, as for ``solve``.
    """

    budget: Given | None = None
    wishes: Wishes = NO_WISHES
    time_limit_seconds: float = 10.0
    link: Link | None = None
    effort: float | None = None

    def solve(self, program: Program, nbytes: int) -> Plan:
        """The plan of a program within so many bytes.

        Raises:
            InfeasibleBudget: no known plan fits.
        """
        limit = self.time_limit_seconds
        return _remembered(
            _PLANS,
            (program, nbytes, self.wishes, self.link, self.effort),
            lambda: solve(
                program, nbytes, wishes=self.wishes, time_limit_seconds=limit, link=self.link, effort=self.effort
            ),
        )

    def floor_bytes(self, program: Program) -> int:
        """The smallest budget of a program that is accepted, however long it takes to find."""
        if self.link is not None:
            return self.solve(program, simulate(program).peak_bytes).floor_bytes
        return _remembered(_FLOORS, (program, self.wishes), lambda: floor_of(self.wishes.applied_to(program)).nbytes)

    def planned(self, variants: Variants) -> Planned:
        """The plan of a step within the budget.

        Raises:
            InfeasibleBudget: no known plan fits.
            ValueError: there is no budget.
        """
        program = variants.plain.program
        if self.budget is None:
            raise ValueError(
                f"{program.name} is checkpointed without a budget, which only autoremat.jax.fit can find: give one "
                '(autoremat.jax.checkpoint(fn, budget="10GiB")), or compile the train step with autoremat.jax.fit'
            )
        return variants.planned(budget_bytes(self.budget, program), self)


_PLANS: dict[tuple[Program, int, Wishes, Link | None, float | None], Plan] = {}
_FLOORS: dict[tuple[Program, Wishes], int] = {}
K = TypeVar("K")
T = TypeVar("T")


def _remembered(known: dict[K, T], key: K, make: Callable[[], T]) -> T:
    """What was made for this key, or is made now."""
    if key not in known:
        while len(known) >= _REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = make()
    return known[key]


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
            found = variants.planned(nbytes, asked)
        except InfeasibleBudget as error:
            found = variants.planned(error.floor_bytes, asked)
            self.is_at_the_floor &= True
        else:
            self.is_at_the_floor = False
        self.plans.append(found.plan)
        return found


_ALLOWANCE: ContextVar[Allowance | None] = ContextVar("allowance", default=None)
_TRACED_ANEW: Final = jax.make_user_context(default_value=0)
"""What JAX has traced under another value it traces again: no jit inside of a step remembers an old plan."""
_ALLOWANCES: Final = itertools.count(1)


def is_fitting() -> bool:
    """Whether ``fit`` is at work."""
    return _ALLOWANCE.get() is not None


@contextmanager
def allowed(allowance: Allowance) -> Iterator[None]:
    """Have checkpointed functions ask ``fit`` what they may take."""
    token = _ALLOWANCE.set(allowance)
    try:
        with _TRACED_ANEW(next(_ALLOWANCES)):
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
    return asked.planned(variants) if allowance is None else allowance.planned(variants, asked)
