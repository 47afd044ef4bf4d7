"""The plan of a compiled step that is not going to be run: traced, planned, scheduled, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from autoremat.engines.torch.compiled.backends import kind_of, named
from autoremat.engines.torch.compiled.session import CompiledSession, Planner
from autoremat.engines.torch.compiled.stored import PlannedGraph
from autoremat.engines.torch.world.problems import NOTHING, NothingDifferentiable
from autoremat.program import InfeasibleBudget


class _Planned(BaseException):
    """Ends a compilation once it is planned. No ``Exception``: the compiler would take it for an error of a backend."""


class _Beforehand(CompiledSession):
    """Plans the graph of a callable, and goes no further."""

    def takes(self, graph: PlannedGraph) -> None:
        super().takes(graph)
        raise _Planned


def planned_beforehand(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], planner: Planner, backend: str
) -> PlannedGraph:
    """The plan that a compiled step would follow. Nothing runs, and no code is compiled.

    Args:
        fn: the callable, not compiled.
        args: its positional arguments.
        kwargs: its keyword arguments.
        planner: knows the budget and makes plans.
        backend: that ``torch.compile`` would be given by name.

    Raises:
        InfeasibleBudget: no plan fits, or none as Inductor would run it.
        NothingDifferentiable: the step has no backward.
        ValueError: the backend is not built on AOTAutograd, or the compiler would make several graphs of the callable.
    """
    inner = named(backend)
    if not kind_of(inner):
        raise ValueError(f"{backend!r} is not built on AOTAutograd, so no plan can be carried out under it")
    session = _Beforehand(fn, planner)

    def run(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    def plan_only(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        try:
            session.made(inner, module, inputs)
        except InfeasibleBudget as error:
            refused.append(error)
        raise _Planned

    refused: list[InfeasibleBudget] = []
    try:
        torch.compile(run, backend=plan_only, fullgraph=True)(*args, **kwargs)
    except _Planned:
        pass
    except torch._dynamo.exc.Unsupported as error:
        raise ValueError(
            f"{session.name} would be compiled into several graphs, and a budget is for a step in one graph; the "
            f"compiler says: {error.msg}"
        ) from error
    if refused:
        raise refused[0]
    if not session.graphs:
        raise NothingDifferentiable(NOTHING)
    return session.graphs[-1]
