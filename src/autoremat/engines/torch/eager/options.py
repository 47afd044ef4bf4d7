"""What a user asks of ``checkpoint``, and the plans made for it."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from autoremat.engines.torch.eager.away import Store
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.operators.timing import Progress
from autoremat.engines.torch.world.memory import free_bytes
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.engines.torch.world.tiers import TierOf
from autoremat.planner import solve
from autoremat.planner.beside import Wanted
from autoremat.planner.search.floor import floor_of
from autoremat.planner.solving import LIMIT_SECONDS
from autoremat.planner.wishes import Patterns, Wishes
from autoremat.program import Link, Once, Plan, Program, simulate
from autoremat.program.units import Budget

Given = int | float | str
"""The types in which a budget may be given."""
Shown = Callable[[], contextlib.AbstractContextManager[Progress | None]]
"""Opens a block in which progress is shown."""
TIGHT: Final = 0.1
"""Share of the work for an immediate plan.

It is used where the budget is too tight for the greedy.
"""


def _tier_named_in(plan: Plan | None) -> str | None:
    """Name the tier of a user's plan, if it moves anything."""
    if plan is None or plan.program.link is None or not plan.schedule.offloads:
        return None
    name = plan.program.link.name
    if name.partition(":")[0] not in ("disk", "host"):
        raise ValueError(
            f'the plan moves values to a tier that it calls {name!r}; say which one is meant: offload="disk:/path" or '
            '"host"'
        )
    return name


class Options:
    """What a user asked of ``checkpoint``; makes the plans."""

    def __init__(
        self, budget: Given, optimizer: Any, keep: Patterns, recompute: Patterns, time_limit_seconds: float,
        measure: bool = False, given: Plan | None = None, *, shown: Shown = contextlib.nullcontext,
        offload: str | None = None, offload_budget: int | str | None = None, effort: float | None = None,
    ) -> None:  # fmt: skip
        self.given, self.near, self._shown = given, given, shown
        self.budget, self.optimizer, self.time_limit_seconds = budget, optimizer, time_limit_seconds
        self.effort = effort
        Budget.read(budget)  # refuse at once what nobody can mean
        self._tier = TierOf(offload or _tier_named_in(given), offload_budget)
        self.wishes, self.measure = Wishes(keep, recompute), measure
        self._settled_bytes: int | None = None
        """The bytes of a share of the plain peak, once settled.

        The first plan settles them; later kinds of input have as many.
        """
        self._floor: tuple[weakref.ref[Program], int] | None = None
        """The floor that was looked for last."""

    def __getstate__(self) -> dict[str, Any]:
        """Replace the optimizer by its bytes, which a copied model needs."""
        tier = TierOf(*self._tier.asked)
        own = {"optimizer": optimizer_bytes(self.optimizer), "_settled_bytes": None, "_floor": None, "_tier": tier}
        return vars(self) | own

    @property
    def _asked(self) -> Budget:
        return Budget.read(self.budget)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``checkpoint``."""
        offload, offload_budget = self._tier.asked
        return {
            "budget": None if self.given else self.budget,
            "optimizer": self.optimizer,
            **vars(self.wishes),
            "time_limit_seconds": self.time_limit_seconds,
            "effort": self.effort,
            "measure": self.measure,
            "plan": self.given,
            "offload": offload,
            "offload_budget": offload_budget,
        }

    def first(self, fixed_bytes: int) -> Callable[[int], float]:
        """Return what a first step may take, given plain training's bytes.

        What is always there does not count. A share of the plain peak is not known before the step has been recorded;
        by then what is held is at most that share of what plain training would hold.
        """
        fixed_bytes += optimizer_bytes(self.optimizer)[0]
        budget = self._budget(fixed_bytes)
        if budget.share == 1:
            return lambda plain_bytes: math.inf
        return lambda plain_bytes: budget.in_bytes(fixed_bytes + plain_bytes) - fixed_bytes

    def is_kept(self, module: str, name: str) -> bool:
        """Tell whether the user wants this module's operator kept."""
        return self.wishes.keeps(module, name)

    def assembled(self, first: FirstStep) -> Program:
        """Make a first step's program, operators measured within the budget."""
        with self._shown() as progress:
            state, scratch = optimizer_bytes(self.optimizer)
            return first.program(
                optimizer_state_bytes=state, optimizer_scratch_bytes=scratch, progress=progress, limit=self._in_bytes
            )

    def budget_bytes(self, program: Program, plain_peak_bytes: int, *, anew: bool = False) -> int:
        """Return the budget, where plain training has this peak.

        A share of a peak is settled by the first plan; ``anew``: by a plan that knows more than that one.
        """
        nbytes = self.share_bytes(program, plain_peak_bytes)
        if self._asked.share is None:
            return nbytes
        if self._settled_bytes is None or (anew and nbytes > self._settled_bytes):
            self._settled_bytes = nbytes
        return self._settled_bytes

    @property
    def settled_bytes(self) -> int | None:
        """Return what a share of the peak came to, once planned."""
        return self._settled_bytes

    def share_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        """Return the budget as if this were the first plan."""
        return self._of_device(program.fixed_bytes).in_bytes(plain_peak_bytes)

    def _budget(self, fixed_bytes: int) -> Budget:
        return self._of_device(fixed_bytes) if self._settled_bytes is None else Budget(self._settled_bytes)

    def _of_device(self, fixed_bytes: int) -> Budget:
        return self._asked.resolved(lambda: free_bytes() + fixed_bytes)

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        """Plan within a budget, with work for so many seconds.

        With none given, it is the first plan found, without a floor; what ``near`` recomputes is tried, too.
        """
        is_first = seconds is None
        wanted = self.wanted(program, budget, TIGHT * self.time_limit_seconds if seconds is None else seconds)
        with self._shown() as progress:
            return solve(
                program, budget, wishes=wanted.wishes, time_limit_seconds=wanted.seconds, effort=wanted.effort,
                progress=progress, first=is_first, near=self.near, link=self._link(program),
            )  # fmt: skip

    def _link(self, program: Program) -> Link | None:
        """Return the way to the tier; compiled code cannot use it."""
        return self._tier.link() if self._tier.name and program.abilities.reruns == "at asks" else None

    def store(self, nbytes: int) -> tuple[Store, str] | None:
        """Open a step's part of the tier, if there is one."""
        return (self._tier.open(nbytes), self._tier.name) if self._tier.name else None

    def wanted(self, program: Program, budget: int, seconds: float) -> Wanted:
        """Describe the same plan, to be searched for elsewhere.

        ``seconds`` say how much work it is worth. The limit of time is the user's: it does not cut what is short,
        however busy the machine.
        """
        found_out = any(op.once in (Once.MADE_IS_CHANGED, Once.DIFFERS) for op in program.ops)
        wishes = self.wishes.still_possible(program) if found_out else self.wishes
        effort = self.time_limit_seconds / LIMIT_SECONDS if self.effort is None else self.effort
        share = min(1.0, seconds / self.time_limit_seconds)
        return Wanted(program, budget, self.time_limit_seconds, wishes, share * effort)

    def with_floor(self, plan: Plan) -> Plan:
        """Add the smallest accepted budget to a plan.

        A first plan was made without looking for that.
        """
        known = None if self._floor is None or self._floor[0]() is not plan.program else self._floor[1]
        if known is None:
            wanted = self.wanted(plan.program, plan.budget_bytes, 0.0)
            known = min(plan.floor_bytes, floor_of(wanted.wishes.applied_to(plan.program)).nbytes)
            self._floor = weakref.ref(plan.program), known
        return plan if plan.floor_bytes == known else replace(plan, floor_bytes=known)

    def _in_bytes(self, program: Program) -> int:
        return self._budget(program.fixed_bytes).in_bytes(simulate(program).peak_bytes)
