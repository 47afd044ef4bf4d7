"""What the compiler makes of one checkpointed callable: its graphs, their plans, and what became of them."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from autoremat.engines.torch.compiled.backends import INDUCTOR, Backend, compiled_by, kind_of, split_by_torch
from autoremat.engines.torch.compiled.dry import dry_schedule
from autoremat.engines.torch.compiled.fitting import fit
from autoremat.engines.torch.compiled.fusing import fused, is_fused
from autoremat.engines.torch.compiled.joint import NotPlannable, read_joint
from autoremat.engines.torch.compiled.naming import Names, reason_of_break
from autoremat.engines.torch.compiled.partition import Halves, split
from autoremat.engines.torch.compiled.reading import Reading, never, read_program
from autoremat.engines.torch.compiled.stored import Place, PlannedGraph, place_of_graph
from autoremat.engines.torch.compiled.torch_names import has_nested_regions, hold_sizes, reason_of_end, sources_of
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.program import InfeasibleBudget, Plan, Program, Schedule, Value, simulate


class Planner(Protocol):
    """What a user asks, and who makes plans."""

    budget: Any
    keep: Any
    recompute: Any
    time_limit_seconds: float
    optimizer: Any

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
    """

    def __init__(self, fn: Callable[..., Any] | None, planner: Planner) -> None:
        self.fn, self.planner = fn, planner
        self.name = "the compiled step" if fn is None else getattr(fn, "__name__", type(fn).__name__)
        self.graphs: list[PlannedGraph] = []
        self.calls = 0
        self.broken = ""
        """Why the compiler makes several graphs of the callable; "" while it makes one."""
        self._lock = threading.RLock()
        self._met: Callable[..., Any] = _inlined(fn)
        self._apart: dict[Backend, Callable[..., Any]] = {}

    def met_by(self, backend: Backend) -> None:
        """A backend's compiler has come to the callable; ``call`` goes on with it."""
        if backend not in self._apart:
            planned = self.backend(backend, is_whole=False)
            self._apart[backend] = torch.compile(_inlined(self.fn), backend=planned)
        self._met = self._apart[backend]

    def call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A call of the callable, compiled by itself with the backend that came last."""
        return self._met(*args, **kwargs)

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
            return inner(module, inputs)
        try:
            return self._counted(self.made(inner, module, inputs))
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
        partitioner = _Partitioner(self, kind, Names.of(sources_of(module)), place)
        with self._lock:
            run = compiled_by(inner, partitioner, module, inputs, place.token)
            if not partitioner.was_called and place.known is not None:  # torch has had the code already
                self.takes(place.known)
        return run

    def _counted(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The same, calls counted."""

        def counted(*args: Any) -> Any:
            self.calls += 1
            return run(*args)

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
        wishes = planner.budget, planner.keep, planner.recompute, planner.time_limit_seconds
        return *wishes, optimizer_bytes(planner.optimizer), planner.settled_bytes

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
            plan = self._solve(program, budget)
            return PlannedGraph(kind, plan, plan.peak_bytes), halves_of(plan.schedule)
        found = fit(reading, budget, self._solve, halves_of, lambda halves: dry_schedule(halves, program, given))
        return PlannedGraph(kind, found.plan, found.peak_bytes, found.tries), found.halves

    def _solve(self, program: Program, budget_bytes: int) -> Plan:
        return self.planner.solve(program, budget_bytes, math.inf)

    def figures(self) -> dict[str, Any]:
        """What has happened, in the words of ``Stats``."""
        last = self.graphs[-1]
        again = sum(n - 1 for n in last.plan.schedule.runs_of.values())
        return {
            "plan": last.plan,
            "plans": len(self.graphs),
            "planned": len(self.graphs),
            "calls": self.calls,
            "hits": max(0, self.calls - len(self.graphs)),
            "reruns": again * self.calls,
            "executed_by": last.backend,
            "graphs": len(self.graphs),
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
        self.__name__ = f"autoremat({kind_of(inner) or getattr(inner, '__name__', 'backend')})"

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        """What runs in the place of a graph."""
        return self.session.compiled(self.inner, module, inputs, is_whole=self.is_whole)

    def __eq__(self, other: object) -> bool:
        """Whether what the other has compiled serves this one, too."""
        return isinstance(other, PlannedBackend) and (self.session, self.inner) == (other.session, other.inner)

    def __hash__(self) -> int:
        return hash((id(self.session), id(self.inner)))


class _Partitioner:
    """Splits one joint graph by a plan."""

    def __init__(self, session: CompiledSession, kind: str, names: Names, place: Place) -> None:
        self._session, self._kind, self._names, self._place = session, kind, names, place
        self.was_called = False

    def __call__(
        self, module: fx.GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int,
        compiler: str = "", **given: Any,
    ) -> Halves:  # fmt: skip
        session, self.was_called = self._session, True
        try:
            joint = read_joint(module, num_fwd_outputs)
            fuses = self._kind == INDUCTOR
            joint = fused(joint) if fuses else joint
            how = is_fused if fuses else never
            reading = read_program(joint, session.name, self._names, session.beside(), how)
        except NotPlannable as error:
            session.without_plan(str(error))
            return split_by_torch(self._kind, module, joint_inputs, num_fwd_outputs=num_fwd_outputs, **given)
        given["num_fwd_outputs"] = num_fwd_outputs
        graph, halves = session.planned(reading, self._kind, self._place.known, joint_inputs, given)
        session.takes(graph)
        self._place.keep(graph)
        return halves


def _inlined(fn: Any) -> Callable[..., Any]:
    """A function that the compiler traces, whatever file the callable is from."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return run


def _raising(error: InfeasibleBudget) -> Callable[..., Any]:
    """What raises an error whenever it is called."""

    def infeasible(*args: Any) -> Any:
        raise copy.copy(error)

    return torch.compiler.disable(infeasible)
