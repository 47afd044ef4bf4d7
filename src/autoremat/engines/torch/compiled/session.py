"""What the compiler makes of one checkpointed callable: its graphs, their plans, and what became of them."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from autoremat.engines.torch.compiled.backends import INDUCTOR, Backend, compiled_by, kind_of
from autoremat.engines.torch.compiled.dry import dry_schedule
from autoremat.engines.torch.compiled.fitting import fit
from autoremat.engines.torch.compiled.last_word import Begin, LastWord
from autoremat.engines.torch.compiled.naming import Names, reason_of_break
from autoremat.engines.torch.compiled.partition import Halves, split
from autoremat.engines.torch.compiled.partitioner import GraphPartitioner
from autoremat.engines.torch.compiled.reading import Reading
from autoremat.engines.torch.compiled.stored import PlannedGraph, place_of_graph
from autoremat.engines.torch.compiled.torch_names import has_nested_regions, hold_sizes, reason_of_end, sources_of
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.planner.wishes import Wishes
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, Value, simulate


class Planner(Protocol):
    """What a user asks, and who makes plans."""

    wishes: Wishes
    time_limit_seconds: float
    effort: float | None
    optimizer: Any

    @property
    def budget(self) -> Any:
        """As the user gave it."""

    @property
    def settled_bytes(self) -> int | None:
        """What a share of the plain peak has come to, once there is a plan."""

    def budget_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        """The budget, where plain training has this peak."""

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        """A plan within so many bytes."""


class CompiledSession:
    """Plans the graphs of one checkpointed callable.

    Args:
        fn: the callable, without autoremat; None where the compiler hands over its graphs itself.
        planner: knows the budget and makes plans.
        measure: begins to measure a step; None where the user has not asked for it.
    """

    def __init__(self, fn: Callable[..., Any] | None, planner: Planner, measure: Begin | None = None) -> None:
        self.fn, self.planner = fn, planner
        self.name = "the compiled step" if fn is None else getattr(fn, "__name__", type(fn).__name__)
        self.graphs: list[PlannedGraph] = []
        self.calls = self.unplanned = 0
        self.margin_bytes = 0
        """What a measured step has taken beyond what was scheduled, where that was too much."""
        self.broken = ""
        """Why the compiler makes several graphs of the callable; "" while it makes one."""
        self._lock = threading.RLock()
        self._last_word = LastWord(measure, self._too_much)
        self._met: Backend | None = None
        self._apart: dict[tuple[Backend | None, int], Callable[..., Any]] = {}

    def met_by(self, backend: Backend) -> None:
        """A backend's compiler has come to the callable; ``call`` goes on with it."""
        self._met = backend

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call of the callable, compiled by itself with the backend that came last."""
        key = self._met, self.margin_bytes
        compiled = self._apart.get(key)
        if compiled is None:
            assert self._met is not None
            backend = self.backend(self._met, is_whole=False)
            compiled = self._apart[key] = torch.compile(_inlined(self.fn), backend=backend)
        before = self.calls, self.unplanned
        result = compiled(*args, **kwargs)
        if before == (self.calls, self.unplanned) and _has_history(result):
            self._ran_eagerly()
        return result

    def _ran_eagerly(self) -> None:
        """The compiler has made no graph of a call that has a backward: nobody has planned it."""
        self.unplanned += 1
        self.without_plan(
            "torch.compile has made no graph of it, and runs it as it is (torch._dynamo.explain says why; recurrent "
            "modules such as nn.GRU need torch._dynamo.config.allow_rnn)"
        )

    def _too_much(self, graph: PlannedGraph, taken_bytes: int) -> None:
        """A measured step has taken more than the budget: plan for as much less, once."""
        again = not self.margin_bytes and bool(self._apart)
        warnings.warn(
            f"autoremat: a step of {self.name} took {taken_bytes} bytes, beyond the budget of "
            f"{graph.plan.budget_bytes}; "
            + ("the next one is planned with that margin" if again else "give a smaller budget"),
            RuntimeWarning,
            stacklevel=2,
        )
        if again:
            self.margin_bytes = taken_bytes - graph.scheduled_peak_bytes

    def backend(self, inner: Backend, *, is_whole: bool) -> PlannedBackend:
        """A backend in whose graphs the budget holds; ``is_whole``: every such graph has all of the callable in it."""
        return PlannedBackend(self, inner, is_whole=is_whole)

    def compiled(
        self, inner: Backend, module: fx.GraphModule, inputs: Sequence[Any], *, is_whole: bool
    ) -> Callable[..., Any]:
        """What runs in the place of a graph; where no plan fits, it raises ``InfeasibleBudget`` whenever it is called.

        The compiler would wrap an error that is raised here into one of its own.
        """
        if (not is_whole and self._is_part(module)) or self._has_regions(module):
            return self._counted(inner(module, inputs), None)
        try:
            return self.made(inner, module, inputs)
        except InfeasibleBudget as error:
            return _raising(error)

    def made(self, inner: Backend, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What a backend makes of a planned graph.

        Raises:
            InfeasibleBudget: no plan fits, or none as Inductor would run it.
        """
        hold_sizes(module)
        kind = kind_of(inner)
        place = place_of_graph(module, inputs, (kind, *self._wishes()))
        partitioner = GraphPartitioner(self, kind, Names.of(sources_of(module)), place)
        with self._lock:
            run = compiled_by(inner, partitioner, module, inputs, place.token)
            if not partitioner.was_called and place.known is None:
                return run  # nothing is differentiated in it
            if not partitioner.was_called and place.known is not None:  # torch has had the code already
                self.takes(place.known)
            return self._counted(run, self.graphs[-1] if not partitioner.was_refused else None)

    def _counted(self, run: Callable[..., Any], graph: PlannedGraph | None) -> Callable[..., Any]:
        """The same, calls counted; ``graph``: None where it has no plan."""

        def counted(*args: Any) -> Any:
            if graph is None:
                self.unplanned += 1
                return run(*args)
            self.calls += 1
            return self._last_word.run(graph, run, args)

        return torch.compiler.disable(counted)

    def _has_regions(self, module: fx.GraphModule) -> bool:
        """Whether parts of a graph are compiled, and split, by themselves."""
        if not has_nested_regions(module):
            return False
        self.without_plan("parts of it are compiled as regions (nested_compile_region)")
        return True

    def without_plan(self, why: str) -> None:
        """Say that a graph is left to torch's own partitioner."""
        warnings.warn(f"autoremat: {self.name} is compiled without a plan: {why}", RuntimeWarning, stacklevel=2)

    def _is_part(self, module: fx.GraphModule) -> bool:
        """Whether a graph is one of several, for all of which there is no plan."""
        reason = reason_of_end(module)
        if not self.broken and getattr(reason, "graph_break", False):
            self.broken = reason_of_break(reason)
            warnings.warn(
                f"autoremat: {self.name} is compiled into several graphs, because of {self.broken}; a budget is for a "
                "step in one graph, so all of them are compiled without a plan; take the graph break out (fullgraph="
                "True names them all), or train without torch.compile",
                RuntimeWarning,
                stacklevel=2,
            )
        return bool(self.broken)

    def takes(self, graph: PlannedGraph) -> None:
        """A graph has been planned, here or by an earlier process."""
        self.planner.budget_bytes(graph.plan.program, graph.plan.plain_peak_bytes)
        self.graphs.append(graph)

    def _wishes(self) -> tuple[Any, ...]:
        """All that a plan depends on beside the graph."""
        planner = self.planner
        wishes = planner.budget, planner.wishes, planner.time_limit_seconds, planner.effort
        return *wishes, optimizer_bytes(planner.optimizer), planner.settled_bytes, self.margin_bytes

    def planned(
        self, reading: Reading, kind: str, known: PlannedGraph | None, joint_inputs: Sequence[object],
        given: dict[str, Any],
    ) -> tuple[PlannedGraph, Halves]:  # fmt: skip
        """A graph under its plan; ``known``: what an earlier process has planned.

        Raises:
            InfeasibleBudget: no plan fits, or none as Inductor would run it.
        """
        program = reading.program
        if known is not None and known.serves(program):
            return known, split(reading, known.plan.schedule, joint_inputs, **given)
        budget = self.planner.budget_bytes(program, simulate(program).peak_bytes)

        def halves_of(schedule: Schedule) -> Halves:
            return split(reading, schedule, joint_inputs, **given)

        if kind != INDUCTOR:
            plan = replace(self._solve(program, budget - self.margin_bytes), budget_bytes=budget)
            return PlannedGraph(kind, plan, plan.peak_bytes), halves_of(plan.schedule)
        dry = partial(dry_schedule, program=program, given=given)
        found = fit(reading, budget, self._solve, halves_of, dry, self.margin_bytes)
        return PlannedGraph(kind, found.plan, found.peak_bytes, found.tries), found.halves

    def _solve(self, program: Program, budget_bytes: int) -> Plan:
        return self.planner.solve(program, budget_bytes, math.inf)

    def figures(self) -> dict[str, Any]:
        """What has happened, in the words of ``Stats``."""
        self._last_word.end()
        if not self.graphs:
            return {"unplanned": self.unplanned}
        last = self.graphs[-1]
        again = sum(n - 1 for n in last.plan.schedule.runs_of.values())
        return {
            "plan": last.plan,
            "plans": len(self.graphs),
            "planned": len(self.graphs),
            "calls": self.calls,
            "hits": max(0, self.calls - len(self.graphs)),
            "reruns": again * self.calls,
            "unplanned": self.unplanned,
            "measured_peak_bytes": self._last_word.measured.get(id(last)),
            "executed_by": last.backend,
            "graphs": len(self.graphs),
            "scheduled_peak_bytes": last.scheduled_peak_bytes,
        }

    def beside(self) -> list[Value]:
        """What is there during the whole step, beside what a graph knows of."""
        state, _ = optimizer_bytes(self.planner.optimizer)
        if not state:
            return []
        return [Value("optimizer.state", state, fixed=True, label="optimizer state", kind="optimizer")]


class PlannedBackend:
    """A backend whose graphs are planned.

    Args:
        session: plans them.
        inner: the user's backend, which compiles what comes of that.
        is_whole: whether every graph has all of the callable in it.
    """

    def __init__(self, session: CompiledSession, inner: Backend, *, is_whole: bool) -> None:
        self.session, self.inner, self.is_whole = session, inner, is_whole
        self._key = id(session), id(inner), is_whole, session.margin_bytes
        self.__name__ = f"autoremat({kind_of(inner) or getattr(inner, '__name__', 'backend')})"

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """What runs in the place of a graph."""
        return self.session.compiled(self.inner, module, inputs, is_whole=self.is_whole)

    def __eq__(self, other: object) -> bool:
        """Whether what the other has compiled serves this one, too."""
        return isinstance(other, PlannedBackend) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _inlined(fn: Any) -> Callable[..., Any]:
    """A function that the compiler traces, whatever file the callable is from."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return run


def _has_history(result: Any) -> bool:
    """Whether something that a call has returned has a backward."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves)


def _raising(error: InfeasibleBudget) -> Callable[..., Any]:
    """What raises an error whenever it is called."""

    def infeasible(*args: Any) -> Any:
        raise copy.copy(error)

    return torch.compiler.disable(infeasible)
