"""A checkpointed callable over its life: one plan per input kind."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from autoremat.engines.torch.eager.aside import is_heard, is_traced, obstacle, own_checkpointing, tell_compiled
from autoremat.engines.torch.eager.changing import what_changes
from autoremat.engines.torch.eager.families import Family
from autoremat.engines.torch.eager.here import Here
from autoremat.engines.torch.eager.inputs import Form, Sizes, input_of
from autoremat.engines.torch.eager.kinds import Kind, Prepared, Straying
from autoremat.engines.torch.eager.newcomers import Newcomers
from autoremat.engines.torch.eager.peaks import Peaks
from autoremat.engines.torch.eager.planning import Planner, Planning
from autoremat.engines.torch.eager.reporter import Reporter
from autoremat.engines.torch.eager.stats import Stats
from autoremat.engines.torch.eager.steps import Steps
from autoremat.engines.torch.eager.tape import unheard
from autoremat.engines.torch.operators.local import local_of
from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.world.devices import check_devices
from autoremat.engines.torch.world.gradients import gradients_left, gradients_there
from autoremat.engines.torch.world.modules import reachable_modules
from autoremat.engines.torch.world.parallel import check_supported, parallel_of
from autoremat.planner import clock
from autoremat.program import InfeasibleBudget

MAX_PLANS: Final = 64
"""Beyond this, plans of least recently used kinds are forgotten."""


class Session:
    """Calls ``fn`` under its input's plan, made at a kind's first call.

    Args:
        fn: the callable, without autoremat.
        planner: makes plans.
        measure: measure the peak of one step of every plan, whatever that takes.
    """

    def __init__(self, fn: Callable[..., Any], planner: Planner, *, measure: bool = False) -> None:
        self.fn, self.planner, self.measure = fn, planner, measure
        self._families: OrderedDict[Any, Family] = OrderedDict()
        self._lock, self._here = threading.RLock(), Here()
        self._newcomers = Newcomers()
        self._last: Kind | None = None
        """The kind whose plan was used last."""
        self._reporter = Reporter()
        self._peaks = Peaks(fn, self._reporter, asked=measure)
        self._planning = Planning(planner, self._reporter)
        self._steps = Steps(fn, planner, self._planning, self._reporter, self._here)

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the callable, with the results and effects of a plain run.

        Gradients, buffers and generators are those of a plain run, too.
        """
        if torch.compiler.is_compiling():  # this comes first: the compiler could not follow what comes below
            self._reporter.counts.unplanned += 1
            tell_compiled()
            return self.fn(*args, **kwargs)
        if self._here.inside or is_heard() or is_traced():
            return self.fn(*args, **kwargs)
        self._here.inside, n_modes = True, torch._C._len_torch_function_stack()
        try:
            return self._outermost(args, kwargs)
        except BaseException:
            unheard(n_modes)
            raise
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
        if kind is not None and kind.prepared.to_measure and kind.steps > 1 and kind.finds_all:
            return self._peaks.measured(kind, args, kwargs, lambda: self._run(kind, args, kwargs))
        return self._run(kind, args, kwargs)

    def _run(self, kind: Kind | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if kind is not None and kind.is_new:
            begin = clock.now()
            result = self._steps.first(kind, args, kwargs, is_first=self._last is None)
            kind.prepared.cost_seconds = clock.now() - begin
            with self._lock:
                form, family = next(((f, k) for f, k in self._families.items() if kind in k), (None, None))
                if form is not None and family is not None:
                    family.recorded(kind, self._planning.foreseen)
                    self._newcomers.has_recorded(form, kind.sizes, kind.prepared.cost_seconds)
            self._last = self._last if kind.plan is None else kind
            return result
        if kind is not None and kind.relative is not None:
            begin = clock.now()
            result = self._steps.noted(kind, args, kwargs)
            self._newcomers.has_noted(kind.newcomer, clock.now() - begin)
            return result
        if kind is None or kind.script is None:
            return self._steps.plain(kind, args, kwargs)
        return self._steps.under_plan.run(kind, args, kwargs)

    def _kind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Kind:
        with self._lock:
            form, sizes = input_of(self.fn, args, kwargs)
            family = self._families.get(form)
            kind = None
            if family is not None:
                self._families.move_to_end(form)
                kind = family.find(sizes) or self._accumulating(family, sizes, args, kwargs)
                if kind is not None and family.foresees_smaller(kind, self._planning.foreseen):
                    kind = family.find(sizes)
            if kind is None or kind.stale or kind.pays:
                return self._of_no_plan(args, kwargs, form, sizes, kind)
            if kind.cached is not None and not kind.prepared.differing and kind.cached.outlive():
                kind.is_new = True  # the second step will make other calls than the first one
            elif kind.goes_by_plan and self._planning.renewed(kind.prepared, self._here.living):
                kind.steps = 0
            elif kind.plan is not None:
                self._reporter.counts.hits += 1
                self._newcomers.has_followed()
            kind.has_come()
            self._last = self._last if kind.plan is None else kind
            return kind

    def _of_no_plan(
        self, args: Sequence[Any], kwargs: dict[str, Any], form: Form, sizes: Sizes, before: Kind | None
    ) -> Kind:
        """Make the kind of an input without a fitting plan.

        It is to be recorded, or not. ``before``: the kind that the input was taken for up to now.
        """
        family = self._families.get(form, Family())
        newcomer = form, family.newcomer(sizes)
        relative = before if before is not None and before.script is not None else family.largest() or self._last
        is_paid = relative is None or (before is not None and before.pays)
        kind = self._new(args, kwargs, before, sizes)
        if is_paid or not kind.is_new or self._newcomers.may_record(newcomer):
            self._reporter.checkpoints_itself(own_checkpointing(self.fn, args, kwargs))
            family.add(kind)
            self._families[form] = family
            self._forget()
            kind.has_come()
        else:
            kind.is_new, kind.relative, kind.newcomer = False, relative, newcomer
            self._tell_new_ones(args, kwargs, form, sizes)
        return kind

    def _tell_new_ones(self, args: Sequence[Any], kwargs: dict[str, Any], form: Form, sizes: Sizes) -> None:
        """Say, rarely, which argument keeps making new kinds.

        It takes a moment to find that.
        """
        if self._newcomers.denied & (self._newcomers.denied - 1):
            return
        name, how = what_changes(self.fn, args, kwargs, [*self._newcomers.recorded, (form, sizes)])
        self._reporter.new_kinds(name, how)

    def _accumulating(
        self, family: Family, sizes: Sizes, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Kind | None:  # fmt: skip
        """Return a recorded kind, planned for existing gradients; None: record it."""
        relative = family.relative(sizes)
        if relative is None or relative.prepared.program is None:
            return None
        if relative.cached is not None and relative.cached.outlive():
            return None  # this step will make other calls
        left = gradients_left(relative.prepared.program)
        there = gradients_there(reachable_modules(self.fn, args, kwargs), left)
        try:
            prepared = self._planning.accumulating(relative.prepared, there, self._here.living)
        except InfeasibleBudget:
            if relative.sizes.fits_into(sizes):
                raise
            return None  # the plan was for something larger, which may never come
        self._steps.knows(prepared, args, kwargs)
        family.add(Kind(prepared, replace(relative.sizes, gradients=sizes.gradients)))
        self._forget()
        return family.find(sizes)

    def _forget(self) -> None:
        """Forget the least recently used plans, beyond ``MAX_PLANS``."""
        while sum(map(len, self._families.values())) > MAX_PLANS:
            eldest = next(iter(self._families))
            self._families[eldest].forget()
            if not self._families[eldest]:
                del self._families[eldest]

    def _new(self, args: Sequence[Any], kwargs: dict[str, Any], before: Kind | None, sizes: Sizes) -> Kind:
        """Make a kind of input that is new, or recorded anew."""
        modules = reachable_modules(self.fn, args, kwargs)
        check_devices(modules, args, kwargs)
        straying = Straying() if before is None or before.pays else before.straying
        kind = Kind(Prepared(parallel=parallel_of(modules)), sizes, straying=straying.recorded_anew())
        if before is not None and not before.pays and before.plan is not None:
            kind.outgrown = before.prepared, before.straying.growth
        try:
            check_supported(kind.prepared.parallel, modules)
            kind.is_new = True
        except Exception as error:  # noqa: BLE001 - it says in words what it cannot deal with
            self._reporter.not_recorded(f"{type(error).__name__}: {error}")
        return kind

    def kept(self) -> tuple[str, ...]:
        """List operators whose reruns give something else: where, and why."""
        return tuple(self._reporter.kept)

    def stats(self) -> Stats:
        """Return what has happened so far."""
        self._peaks.end()
        kinds = [k for family in self._families.values() for k in family.kinds()]
        plan, measured = (None, None) if self._last is None else (self._last.plan, self._last.prepared.measured_bytes)
        return self._reporter.stats(plan, measured, len(kinds))


def _bytes_by_address(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[int, int]:
    """Return the memory of tensors among the arguments, by address."""
    given = (t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    return {s._cdata: s.nbytes() for t in given if (s := storage_of(local_of(t))) is not None}
