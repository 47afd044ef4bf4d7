"""What a checkpointed callable has done, for people and loggers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from autoremat.program import Plan

_NO_NUMBERS = ("plan", "executed_by")
_OF_THE_PLAN = ("peak_bytes", "budget_bytes", "plain_peak_bytes", "floor_bytes", "overhead", "lower_bound")


@dataclass(frozen=True)
class Stats:
    """What a checkpointed callable has done so far.

    Attributes:
        plan: the plan used last; None before the first call.
        measured_peak_bytes: of a step under that plan, by the allocator's own account; None if none was measured. On
            CPU that takes ``checkpoint(..., measure=True)``.
        plans: number of plans in the cache.
        calls: calls with gradients.
        hits: calls that found their plan in the cache.
        planned: how often a plan was made.
        deviations: calls that left the recorded path and went on under the online policy, or whose kind of input is not
            recorded, so that they ran under it from the start.
        unplanned: calls that ran without checkpointing.
        reruns: operators run again in all backward passes so far.
        rerun_seconds: how long that took; on CUDA only what the host did, because kernels run on their own.
        retries: forwards that ran out of memory and were tried again under a tighter plan.
        differing: operators found to give something else when they are rerun; what they make is kept.
        executed_by: who carries out the plan: ``autoremat``, call by call, or the backend of ``torch.compile``.
        graphs: how many graphs of ``torch.compile`` have been planned.
        scheduled_peak_bytes: of a compiled step under that plan, as its backend will run it; None for others.
    """

    plan: Plan | None
    measured_peak_bytes: int | None
    plans: int
    calls: int
    hits: int
    planned: int
    deviations: int
    unplanned: int
    reruns: int
    rerun_seconds: float
    retries: int
    differing: int
    executed_by: str = "autoremat"
    graphs: int = 0
    scheduled_peak_bytes: int | None = None

    @property
    def fallbacks(self) -> int:
        """Calls that did not follow their plan, or ran without checkpointing."""
        return self.deviations + self.unplanned

    def as_dict(self) -> dict[str, int | float]:
        """Return numbers only, for a logger.

        These are every field, ``fallbacks``, and of the plan the bytes, overhead and lower bound. What is not known
        (yet) is left out.
        """
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NO_NUMBERS}
        numbers["fallbacks"] = self.fallbacks
        if self.plan is not None:
            numbers |= {name: getattr(self.plan, name) for name in _OF_THE_PLAN}
        if not self.graphs:
            del numbers["graphs"]
        return {name: n for name, n in numbers.items() if n is not None}

    def __str__(self) -> str:
        """Write one line for each number."""
        numbers = self.as_dict()
        width = max(map(len, numbers))
        return "\n".join(
            f"{name:<{width}}  {n:>15,}" if isinstance(n, int) else f"{name:<{width}}  {n:>15.4f}"
            for name, n in numbers.items()
        )


NOTHING_YET = Stats(
    plan=None, measured_peak_bytes=None, plans=0, calls=0, hits=0, planned=0, deviations=0, unplanned=0, reruns=0,
    rerun_seconds=0.0, retries=0, differing=0,
)  # fmt: skip
"""Of a callable that has not been called."""
