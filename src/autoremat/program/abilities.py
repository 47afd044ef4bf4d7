"""``Abilities``: which schedules the engine that recorded a program can carry out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reruns = Literal["anywhere", "at asks", "by decisions"]


@dataclass(frozen=True, slots=True)
class Abilities:
    """Says what an engine can do with a plan.

    Planners obey it, and ``verify`` checks it.

    Attributes:
        reruns: where reruns may stand: ``anywhere``; ``at asks``, only ahead of what the backward asks for; ``by
            decisions``, so that every value is either kept or computed again once (``beyond_decisions``).
        most_runs: how often an op may run in all; None: any number of times. A compiler that keeps or recomputes: 2.
        ordered: the engine runs everything in the order of the schedule. False: it orders runs itself, so that the
            simulated peak is an estimate.
    """

    reruns: Reruns = "anywhere"
    most_runs: int | None = None
    ordered: bool = True

    @property
    def are_limited(self) -> bool:
        """Tell whether the engine cannot carry out every schedule of repeatable ops."""
        return self.most_runs is not None or self.reruns == "by decisions"

    def can_run(self, runs_of: Mapping[int, int]) -> bool:
        """Tell whether every op may run as often as said there.

        Example:
            >>> Abilities(most_runs=2).can_run({0: 1, 1: 3}), Abilities().can_run({0: 1, 1: 3})
            (False, True)
        """
        return self.most_runs is None or max(runs_of.values(), default=0) <= self.most_runs
