"""Kinds of input: what is known of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

from autoremat.engines.torch.eager.first import Cached
from autoremat.engines.torch.eager.inputs import Sizes
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.scripts import script_of
from autoremat.engines.torch.eager.sections import Sections, Taken
from autoremat.engines.torch.world.parallel import Parallel
from autoremat.planner.beside import Search
from autoremat.program import Plan, Program
from autoremat.program.once import Reason

MAX_DEVIATIONS: Final = 3
"""How often at most a kind of input is recorded anew.

A step that has strayed more often of late is noted from the start.
"""
MAX_MEASURED: Final = 3
"""How many steps of a plan may be tried for one measurement."""
_STEADY: Final = 50
"""Steps on the path in a row after which spare stops.

Spare is the preparation for leaving the path. It goes on where it is cheap.
"""
_STEADY_FROM_THE_START: Final = 5
"""The same where no step has ever left the path."""
_CHEAP: Final = 0.02
"""Spare is cheap below this share of a step's time."""
_FORWARDS: Final = 3.0
"""How many forwards a step takes, roughly."""
_MATTERS: Final = 0.02
"""Spare is useful from this share of the budget kept."""
_LONGER: Final = 8
"""Factor by which each search for a better plan is longer."""
_FORGIVEN: Final = 0.1
"""How much less a kind strays with every step on its path."""


@dataclass
class Straying:
    """How steps of a kind leave their path.

    Attributes:
        deviations: how often, in all.
        records: how often the kind has been recorded.
        of_late: how much of late: one for each, a tenth less for every step that makes the calls of the path.
        way: where the last step left the path, and how many calls it made; None if it did not.
        growth: the largest factor by which results were larger than recorded.
    """

    deviations: int = 0
    records: int = 0
    of_late: float = 0.0
    way: tuple[int, int] | None = None
    growth: float = 1.0

    @property
    def is_habit(self) -> bool:
        """Whether steps stray so often that the next one is noted."""
        return self.of_late > MAX_DEVIATIONS

    def recorded_anew(self) -> Straying:
        """Return what to remember when the kind is recorded once more."""
        return Straying(self.deviations, self.records + 1, self.of_late)

    def step_is_over(self, way: tuple[int, int] | None) -> bool:
        """End a step; tell whether it strayed just like the last one."""
        before, self.way = self.way, way
        if way is None:
            self.of_late = max(0.0, self.of_late - _FORGIVEN)
        return way is not None and way == before

    def left(self, growth: float) -> None:
        """Note that a step has left its path."""
        self.deviations += 1
        self.of_late += 1
        self.growth = max(self.growth, growth)


@dataclass
class Steadiness:
    """How steps under a plan have gone.

    Attributes:
        steps: how many in a row have stayed on the path.
        has_strayed: some step has not.
        forward_seconds: the least that a forward has taken of the processor, at the recorded sizes.
    """

    steps: int = 0
    has_strayed: bool = False
    forward_seconds: float = math.inf

    def step_is_over(self, *, is_on_path: bool) -> None:
        """End a step."""
        self.steps = self.steps + 1 if is_on_path else 0
        self.has_strayed = self.has_strayed or not is_on_path

    @property
    def is_enough(self) -> bool:
        """Whether so many steps have stayed that the next one will."""
        return self.steps >= (_STEADY if self.has_strayed else _STEADY_FROM_THE_START)


@dataclass
class Prepared:
    """A recorded step with its plan, and what is known of both.

    Attributes:
        plan: None where steps run without checkpointing.
        program: what was recorded, of a step that finds no gradients.
        gradients: bytes of those that the planned step finds, by name of the parameter.
        found: the same, as ``Sizes.gradients``.
        script: that carries it out; None where there is no plan.
        path: of the forward, once it has been recorded.
        parallel: what torch.distributed does around the modules.
        differing: new reasons why a call must not be rerun, by its number.
        sections: what listens to user code in the backward of the first step.
        taken: what such code takes, if that is not in the plan yet.
        tried_seconds: what the search for the plan was given.
        used_seconds: what steps under the plan have taken, by the plan's account.
        search: for a better plan, if one goes on.
        budget_bytes: what all calls before one backward have.
        checked: a step with this plan has been through the self-check.
        is_of_the_largest: the plan is the user's own, for the largest input and all smaller ones.
        steadiness: how steps under the plan have gone.
        cost_seconds: what recording and planning have taken.
        together: calls before one backward that the plan is for.
        measured_bytes: the measured peak of one of them.
        to_measure: how many more steps may be measured.
    """

    plan: Plan | None = None
    program: Program | None = None
    gradients: dict[str, int] = field(default_factory=dict)
    found: bytes = b""
    script: Script | None = None
    path: Path | None = None
    parallel: Parallel = field(default_factory=Parallel)
    differing: dict[int, Reason] = field(default_factory=dict)
    sections: Sections | None = None
    taken: tuple[Taken, ...] = ()
    tried_seconds: float = 0.0
    used_seconds: float = 0.0
    search: Search | None = None
    budget_bytes: int = 0
    checked: bool = False
    is_of_the_largest: bool = False
    steadiness: Steadiness = field(default_factory=Steadiness)
    cost_seconds: float = 0.0
    together: int = 1
    measured_bytes: int | None = None
    to_measure: int = 0

    def close_sections(self) -> None:
        """End the first step: note what user code in its backward took."""
        if self.sections is not None:
            self.taken, self.sections = self.sections.close(), None

    def step_is_over(self, *, is_on_path: bool) -> None:
        """End a step that has been through the self-check."""
        self.steadiness.step_is_over(is_on_path=is_on_path)
        self.checked = True

    def is_within(self, other: Prepared) -> bool:
        """Tell whether another recording has these calls, nothing smaller."""
        if self.program is None or other.program is None or self.path is None or other.path is None:
            return False
        mine, theirs = ([v for v in p.values if not v.fixed] for p in (self.program, other.program))
        return (
            len(mine) == len(theirs)
            and self.path.is_like(other.path)
            and all(a <= b for a, b in zip(self.path.numels(), other.path.numels(), strict=True))
            and all(a.nbytes <= b.nbytes for a, b in zip(mine, theirs, strict=True))
        )

    @property
    def lost_by_now(self) -> float:
        """Seconds that steps under the plan took above the lower bound."""
        return 0.0 if self.plan is None else (self.plan.overhead - self.plan.lower_bound) * self.used_seconds

    def worth_seconds(self, most: float) -> float:
        """Return what the next search for a better plan is worth."""
        return min(_LONGER * self.tried_seconds, most)

    def follow(self, plan: Plan, budget_bytes: int, *, tried_seconds: float) -> None:
        """Follow this plan; ``budget_bytes`` is for all calls before a backward."""
        self.plan, self.script, self.budget_bytes = plan, self.script_of(plan, budget_bytes), budget_bytes
        self.tried_seconds, self.used_seconds, self.checked = tried_seconds, 0.0, False
        self.measured_bytes, self.to_measure = None, MAX_MEASURED

    def script_of(self, plan: Plan, budget_bytes: int) -> Script:
        """Make what carries out a plan of this step."""
        assert self.path is not None
        # With units, nobody knows off the path which parameters exist.
        return replace(script_of(plan, self.path), budget_bytes=None if self.parallel.units else budget_bytes)


@dataclass
class Kind:
    """What is known of one kind of input.

    Attributes:
        prepared: the step that was recorded for it, or for a larger input whose guest it is.
        sizes: of the input.
        share: of the size of the input that was recorded.
        straying: how its steps leave the path.
        cached: what the first step may have left for the second one to find.
        is_new: the next step is its first one.
        stale: it is to be recorded anew.
        pays: as a guest it has lost more time than a plan of its own takes.
        relative: another kind, by whose account its steps are noted; they are not recorded.
        newcomer: what tells it from other kinds that are not recorded.
        outgrown: what was recorded before, and by what factor the results of later steps were larger.
        steps: calls under the plan.
    """

    prepared: Prepared = field(default_factory=Prepared)
    sizes: Sizes = field(default_factory=Sizes)
    share: float = 1.0
    straying: Straying = field(default_factory=Straying)
    cached: Cached | None = None
    is_new: bool = False
    stale: bool = False
    pays: bool = False
    relative: Kind | None = None
    newcomer: Any = None
    outgrown: tuple[Prepared, float] | None = None
    steps: int = 0

    @property
    def plan(self) -> Plan | None:
        """Its plan; None where it runs without checkpointing."""
        return self.prepared.plan

    @property
    def script(self) -> Script | None:
        """The script of its plan; None where there is none."""
        return self.prepared.script

    @property
    def goes_by_plan(self) -> bool:
        """Whether its next step follows the plan; not if it strays often."""
        return self.plan is not None and not self.straying.is_habit

    @property
    def finds_all(self) -> bool:
        """Whether all gradients in its plan's account exist."""
        return not any(self.prepared.found) or self.sizes.gradients == self.prepared.found

    @property
    def is_wary(self) -> bool:
        """Whether the next step prepares for leaving its path.

        It does until leaving seems unlikely, or where preparing is cheap.
        """
        script = self.script
        if script is None or script.budget_bytes is None or script.saved_bytes[-1] < _MATTERS * script.budget_bytes:
            return False
        assert self.plan is not None
        seconds = min(self.plan.program.seconds, _FORWARDS * self.prepared.steadiness.forward_seconds)
        return not self.prepared.steadiness.is_enough or script.spare_seconds < _CHEAP * self.share * seconds

    def forward_took(self, seconds: float) -> None:
        """Note what a forward under the plan has taken of the processor."""
        steadiness = self.prepared.steadiness
        steadiness.forward_seconds = min(steadiness.forward_seconds, seconds / self.share)

    def serves(self, sizes: Sizes) -> bool:
        """Tell whether an input of these sizes may use its plan."""
        return self.serves_but_for_gradients(sizes) and sizes.finds_within(self.prepared.found)

    def serves_but_for_gradients(self, sizes: Sizes) -> bool:
        """Tell the same, as if its plan knew all gradients."""
        return self.is_host and (self.prepared.is_of_the_largest or sizes.fits_into(self.sizes))

    def has_come(self) -> None:
        """Count one more step."""
        self.steps, self.cached = self.steps + 1, None
        if self.plan is not None and self.goes_by_plan:
            self.prepared.used_seconds += self.plan.program.seconds * self.share

    @property
    def is_host(self) -> bool:
        """Whether smaller inputs may go by its plan."""
        return self.script is not None and not self.stale and not self.straying.is_habit

    def step_is_over(self, way: tuple[int, int] | None) -> None:
        """End a step.

        ``way``: where it left the path, and how many calls it made.
        """
        self.prepared.step_is_over(is_on_path=way is None)
        if self.straying.step_is_over(way) and self.straying.records <= MAX_DEVIATIONS:
            self.stale = True

    def left(self, growth: float) -> bool:
        """Note that a step left the path; tell whether more will."""
        self.straying.left(growth)
        has_grown = growth > 1
        self.stale = has_grown and self.straying.records <= MAX_DEVIATIONS
        return self.straying.is_habit or (has_grown and not self.stale)
