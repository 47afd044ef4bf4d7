"""Tells the user what happens: warnings, each once, and numbers."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field

from autoremat.engines.torch.eager.stats import Stats
from autoremat.program import Plan, Program
from autoremat.program.once import Reason

_LOG = logging.getLogger("autoremat")


@dataclass
class Counts:
    """What has happened so far, named as in ``Stats``."""

    calls: int = 0
    hits: int = 0
    planned: int = 0
    deviations: int = 0
    unplanned: int = 0
    reruns: int = 0
    rerun_seconds: float = 0.0
    retries: int = 0


@dataclass
class Reporter:
    """Tells the user what happens, and counts it.

    Attributes:
        counts: of what has happened.
        kept: the operators whose reruns turned out to give something else: where, and why.
    """

    counts: Counts = field(default_factory=Counts)
    kept: list[str] = field(default_factory=list)
    _warned: set[str] = field(default_factory=set)
    _told: set[tuple[int, str]] = field(default_factory=set)
    """What is known to be kept: the call, and the words."""

    def tell(self, message: str) -> None:
        """Log, once, something in order that the user may want to know."""
        if self._is_first(message):
            _LOG.warning(message)

    def _is_first(self, message: str) -> bool:
        kind = message.split("(")[0]
        is_first = kind not in self._warned
        self._warned.add(kind)
        return is_first

    def warn(self, message: str) -> None:
        """Warn of each thing once."""
        if self._is_first(message):
            warnings.warn(f"autoremat: {message}", RuntimeWarning, stacklevel=2)

    def refuse(self, reason: str) -> None:
        """Say why a call runs without checkpointing."""
        self.counts.unplanned += 1
        self.warn(f"{reason}: running without checkpointing")

    def not_recorded(self, reason: object) -> None:
        """Say why a kind of input runs without checkpointing."""
        self.warn(f"the step could not be recorded ({reason}); it runs without checkpointing")
        self.counts.unplanned += 1

    def checkpoints_itself(self, where: str) -> None:
        """Say where the model's own checkpointing is on, if anywhere."""
        if where:
            self.warn(
                f"the model's own checkpointing is switched on (in {where}): what it wraps is computed again as "
                "a whole, whatever the budget, and only the rest is planned. Switch it off to let the budget decide: "
                "activation_checkpointing_disable() or gradient_checkpointing_disable() in transformers, "
                "disable_gradient_checkpointing() in diffusers, set_grad_checkpointing(False) in timm"
            )

    def new_kinds(self, name: str, how: str) -> None:
        """Say which argument keeps making new kinds of input."""
        self.warn(
            f"new kinds of input keep coming: {name} is another one again and again ({how}). To record each of them "
            "would take longer than to train: from now on steps of new kinds run under the online policy, within the "
            "budget, until a kind has come back often enough to pay for a plan; known kinds keep theirs. Hand over "
            "what does not change which operators run inside an object, or have fewer kinds"
        )

    def keeps(self, program: Program, call: int, reason: Reason) -> None:
        """Say that, and why, a call's results are kept from now on."""
        op = [op for op in program.ops if op.call == call][-1]
        what = f"{op.name} in {op.module or 'the step'} ({op.source or 'unknown line'}) must not run again: {reason}"
        if (call, what) not in self._told:  # a step that is recorded twice finds it twice
            self._told.add((call, what))
            self.kept.append(what)
        self.warn(f"{what}. What it makes is kept from now on")

    def rerun(self, seconds: float) -> None:
        """Count a rerun of a call."""
        self.counts.reruns += 1
        self.counts.rerun_seconds += seconds

    def stats(self, plan: Plan | None, measured_bytes: int | None, plans: int) -> Stats:
        """Return the numbers so far.

        Args:
            plan: the plan used last.
            measured_bytes: its measured peak.
            plans: how many plans there are.
        """
        return Stats(plan, measured_bytes, plans, **vars(self.counts), differing=len(self.kept))
