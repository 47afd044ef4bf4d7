"""A measured step has the last word: where it takes more than the budget, the graph is planned once more, for less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from autoremat.engines.torch.compiled.stored import PlannedGraph


class Measurement(Protocol):
    """The account of one step, from its beginning to the optimizer's step or the next call."""

    def watch(self, result: Any) -> None:
        """The forward is over, with this result."""

    def close(self) -> bool:
        """End it; whether it has ended."""


Begin = Callable[[Sequence[Tensor], Callable[[int], None]], Measurement | None]
"""Begins to measure a step on these tensors, and tells the bytes above those at the beginning; None: not now."""
_WARM: int = 1
"""Calls of a graph before the one that is measured: what is compiled late has been by then."""


class LastWord:
    """Measures one step of every graph.

    Args:
        begin: begins to measure; None where nobody has asked for it.
        too_much: told of a graph, and of the bytes that its step has taken, where these are more than the budget.
    """

    def __init__(self, begin: Begin | None, too_much: Callable[[PlannedGraph, int], None]) -> None:
        self._begin, self._too_much = begin, too_much
        self._calls: dict[int, int] = {}
        self._running: Measurement | None = None
        self.measured: dict[int, int] = {}
        """By the identity of a graph what its measured step has taken."""

    def run(self, graph: PlannedGraph, run: Callable[..., Any], args: Sequence[Any]) -> Any:
        """A call of the graph, measured if it is the one that is."""
        if self._begin is None:
            return run(*args)
        self.end()
        key = id(graph)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] != 1 + _WARM or self._running is not None:
            return run(*args)
        tensors = [t for t in args if isinstance(t, Tensor)]
        self._running = self._begin(tensors, lambda above: self._ended(graph, above))
        result = run(*args)
        if self._running is not None:
            self._running.watch(result)
        return result

    def end(self) -> None:
        """End a measurement that is running, if its step is over."""
        if self._running is not None and self._running.close():
            self._running = None

    def _ended(self, graph: PlannedGraph, above_bytes: int) -> None:
        taken = graph.plan.program.fixed_bytes + above_bytes
        self.measured[id(graph)] = taken
        if taken > graph.plan.budget_bytes:
            self._too_much(graph, taken)
