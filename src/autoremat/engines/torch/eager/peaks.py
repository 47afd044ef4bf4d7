"""Measures the peak of one step of every plan."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.kinds import Kind
from autoremat.engines.torch.eager.measure import Measurement, meter_for
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.recording.assembly import OPTIMIZER_STEP
from autoremat.engines.torch.world.modules import named_tensors, reachable_modules
from autoremat.program import Plan

TOLERANCE: Final = 0.01
"""How far the measured peak may exceed the plan's without warning."""


class Peaks:
    """Measures steps of one callable.

    Args:
        fn: the callable.
        reporter: whom to tell.
        asked: measure whatever that takes.
    """

    def __init__(self, fn: Callable[..., Any], reporter: Reporter, *, asked: bool) -> None:
        self._fn, self._reporter, self.asked = fn, reporter, asked
        self._measurement: Measurement | None = None

    def measured(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        """Make a call, and measure its step's memory where possible."""
        kind.prepared.to_measure -= 1
        measurement = self._measurement_of(kind, args, kwargs) if self._measurement is None else None
        if measurement is None:
            return run()
        self._measurement = measurement
        result = run()
        measurement.watch(result)
        return result

    def _measurement_of(self, kind: Kind, args: Sequence[Any], kwargs: dict[str, Any]) -> Measurement | None:
        plan, deviations = kind.plan, kind.straying.deviations
        assert plan is not None
        given = (x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        own = (t for _, _, t in named_tensors(reachable_modules(self._fn, args, kwargs)))
        meter = meter_for(itertools.chain(given, own), asked=self.asked)
        if meter is None:
            return None

        def on_end(above_bytes: int) -> None:
            if kind.plan is plan and kind.straying.deviations == deviations:
                kind.prepared.measured_bytes, kind.prepared.to_measure = plan.program.fixed_bytes + above_bytes, 0
                self._compare(plan, kind.prepared.measured_bytes)

        with_optimizer = any(op.name == OPTIMIZER_STEP for op in plan.program.ops[-1:])
        return Measurement(meter, with_optimizer, on_end)

    def end(self) -> None:
        """End the account of a step that is over."""
        if self._measurement is not None and self._measurement.close():
            self._measurement = None

    def _compare(self, plan: Plan, measured_bytes: int) -> None:
        if measured_bytes > (1 + TOLERANCE) * plan.peak_bytes:
            self._reporter.warn(
                f"the measured peak of a step is above the plan's ({measured_bytes:,} bytes, predicted were "
                f"{plan.peak_bytes:,}; the budget is {plan.budget_bytes:,}). What runs outside the callable is not in "
                "a plan: wrap a function that returns the loss, and name the optimizer with optimizer=. What cannot be "
                "inside needs a budget that leaves room for it"
            )
