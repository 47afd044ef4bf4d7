"""A checkpointed callable over its life: one plan per kind of input, followed call by call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.aside import is_heard, is_traced, obstacle, own_checkpointing, tell_compiled
from autoremat.engines.torch.eager.families import Family
from autoremat.engines.torch.eager.here import Here
from autoremat.engines.torch.eager.inputs import Sizes, input_of
from autoremat.engines.torch.eager.kinds import Kind, Prepared, Straying
from autoremat.engines.torch.eager.peaks import Peaks
from autoremat.engines.torch.eager.planning import Planner, Planning
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.steps import Steps
from autoremat.plan import clock
from autoremat.program import Plan
from autoremat.record.devices import check_devices
from autoremat.record.local import local_of
from autoremat.record.parallel import check_supported, parallel_of
from autoremat.record.values import storage_of
from autoremat.record.world import reachable_modules
from autoremat.run.stats import Stats

MAX_PLANS: Final = 64
"""Plans of the least recently used kinds of input are forgotten beyond this."""


class Session:
    """Calls ``fn`` under the plan for its input; makes the plan at the first call of a kind.

    Args:
        fn: the callable, without autoremat.
        planner: makes plans.
        measure: measure the peak of one step of every plan, whatever that takes.
    """

    def __init__(self, fn: Callable[..., Any], planner: Planner, *, measure: bool = False) -> None:
        self.fn, self.planner, self.measure = fn, planner, measure
        self._families: OrderedDict[Any, Family] = OrderedDict()
        self._lock, self._here = threading.RLock(), Here()
        self._last: Plan | None = None
        self._reporter = Reporter()
        self._peaks = Peaks(fn, self._reporter, asked=measure)
        self._planning = Planning(planner, self._reporter)
        self._steps = Steps(fn, planner, self._planning, self._reporter, self._here)

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the callable; its results, gradients, buffers and generators are those of a plain run."""
        if torch.compiler.is_compiling():  # first, and without anything that the compiler cannot follow
            self._reporter.counts.unplanned += 1
            tell_compiled()
            return self.fn(*args, **kwargs)
        if self._here.inside or is_heard() or is_traced():
            return self.fn(*args, **kwargs)
        self._here.inside = True
        try:
            return self._outermost(args, kwargs)
        finally:
            self._here.inside = False

    def _outermost(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._peaks.end()
        hindrance = obstacle() if torch.is_grad_enabled() else ""
        kind = None
        if hindrance:
            self._reporter.refuse(hindrance)
        elif torch.is_grad_enabled():
            self._reporter.counts.calls += 1
            self._here.next_call(_bytes_by_address(args, kwargs))
            kind = self._kind(args, kwargs)
        if kind is not None and kind.prepared.to_measure and kind.steps > 1:
            return self._peaks.measured(kind, args, kwargs, lambda: self._run(kind, args, kwargs))
        return self._run(kind, args, kwargs)

    def _run(self, kind: Kind | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if kind is not None and kind.is_new:
            begin = clock.now()
            result = self._steps.first(kind, args, kwargs, is_first=self._last is None)
            kind.prepared.cost_seconds = clock.now() - begin
            with self._lock:
                family = next((f for f in self._families.values() if kind in f), None)
                if family is not None:
                    family.recorded(kind, self._planning.foreseen)
            self._last = kind.plan or self._last
            return result
        if kind is None or kind.script is None:
            return self._steps.plain(kind, args, kwargs)
        return self._steps.planned(kind, args, kwargs)

    def _kind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Kind:
        with self._lock:
            form, sizes = input_of(self.fn, args, kwargs)
            family = self._families.setdefault(form, Family())
            self._families.move_to_end(form)
            kind = family.find(sizes)
            if kind is None or kind.stale:
                kind = self._new(args, kwargs, kind, sizes)
                family.add(kind)
                self._forget()
            elif kind.cached is not None and not kind.prepared.differing and kind.cached.outlive():
                kind.is_new = True  # the second step will make other calls than the first one
            elif kind.plan is not None and self._planning.is_due(kind.prepared, self._here.living):
                self._planning.better(kind.prepared, self._here.living)
                kind.steps = 0
            elif kind.plan is not None:
                self._reporter.counts.hits += 1
            kind.has_come()
            self._last = kind.plan or self._last
            return kind

    def _forget(self) -> None:
        """Forget the plans that were used least recently, so that there are not too many."""
        while sum(map(len, self._families.values())) > MAX_PLANS:
            eldest = next(iter(self._families))
            self._families[eldest].forget()
            if not self._families[eldest]:
                del self._families[eldest]

    def _new(self, args: Sequence[Any], kwargs: dict[str, Any], before: Kind | None, sizes: Sizes) -> Kind:
        """A kind of input that has never been met, or is to be recorded anew."""
        modules = reachable_modules(self.fn, args, kwargs)
        check_devices(modules, args, kwargs)
        straying = Straying() if before is None else before.straying
        kind = Kind(Prepared(parallel=parallel_of(modules)), sizes, straying=straying.recorded_anew())
        if switched_on := own_checkpointing(self.fn, args, kwargs):
            self._reporter.warn(
                f"the model's own checkpointing is switched on (in {switched_on}): what it wraps is computed again as "
                "a whole, whatever the budget, and only the rest is planned. Switch it off to let the budget decide: "
                "activation_checkpointing_disable() or gradient_checkpointing_disable() in transformers, "
                "disable_gradient_checkpointing() in diffusers, set_grad_checkpointing(False) in timm"
            )
        try:
            check_supported(kind.prepared.parallel, modules)
            kind.is_new = True
        except Exception as error:  # noqa: BLE001 - it says in words what it cannot deal with
            self._reporter.not_recorded(f"{type(error).__name__}: {error}")
        return kind

    def kept(self) -> tuple[str, ...]:
        """The operators that turned out to give something else when they run again: where, and why."""
        return tuple(self._reporter.kept)

    def stats(self) -> Stats:
        """What has happened so far."""
        self._peaks.end()
        kinds = [k for family in self._families.values() for k in family.kinds()]
        measured = next((k.prepared.measured_bytes for k in kinds if k.plan is self._last), None)
        return self._reporter.stats(self._last, measured, len(kinds))


def _bytes_by_address(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int, int]:
    """The memory of the tensors among the arguments."""
    given = (t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    return {s._cdata: s.nbytes() for t in given if (s := storage_of(local_of(t))) is not None}
