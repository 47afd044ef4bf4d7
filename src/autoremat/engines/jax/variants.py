"""One step, recorded at a price: what its scans keep depends on what a byte costs, and what it takes, on that.

Of all prices the lowest is looked for at which the step fits without any further runs outside of its scans; beside it,
the next lower one, with further runs. The faster one of the two is the plan. The floor is that of the two highest
prices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import jax

from autoremat.engines.jax.facts import is_inexact
from autoremat.engines.jax.graph import graph_of
from autoremat.engines.jax.looping import scanned
from autoremat.engines.jax.recording import Flat, Names, Recorded, record
from autoremat.engines.jax.rewriting import as_it_is, has_scans, shape_of, with_scans
from autoremat.engines.jax.scans import Choice, Shape, breakpoints, choices_of, chosen
from autoremat.program import InfeasibleBudget, Plan, Program, simulate

_MOST_PRICES: Final = 32


class Planner(Protocol):
    """Plans programs."""

    def solve(self, program: Program, nbytes: int) -> Plan:
        """The plan of a program within so many bytes, or ``InfeasibleBudget``."""
        ...

    def floor_bytes(self, program: Program) -> int:
        """The smallest budget of a program that is accepted."""
        ...


@dataclass(frozen=True, eq=False)
class Planned:
    """A step as it was recorded, and its plan."""

    recorded: Recorded
    plan: Plan


class Variants:
    """The recordings of one step, by price."""

    def __init__(self, closed: Any, avals: Sequence[Any], is_differentiated: Sequence[bool], names: Names) -> None:
        self._closed, self._avals, self._names = closed, avals, names
        self._is_differentiated = is_differentiated
        self.has_scans = has_scans(closed)
        self._at: dict[float, Recorded] = {}
        self._choices: dict[tuple[int, tuple[bool, ...], float], tuple[Any, list[Choice]]] = {}

    @property
    def plain(self) -> Recorded:
        """The step where bytes cost nothing."""
        return self.at(0.0)

    def at(self, price: float) -> Recorded:
        """The step where a byte costs so many seconds."""
        if price not in self._at:
            flat = with_scans(self._closed, self._rule(price)) if self.has_scans else _as_traced(self._closed)
            self._at[price] = record(flat, self._avals, self._is_differentiated, self._names)
        return self._at[price]

    def planned(self, nbytes: int, planner: Planner) -> Planned:
        """The fastest plan known within so many bytes.

        Raises:
            InfeasibleBudget: there is none.
        """
        plain = self.plain.program
        if not self.has_scans:
            return Planned(self.plain, planner.solve(plain, nbytes))
        floors = self._floors(planner)
        if simulate(plain).peak_bytes <= nbytes:
            found = [Planned(self.plain, planner.solve(plain, nbytes))]
        else:
            found = [p for p in (self._tried(price, nbytes, planner) for price in self._worth_trying(nbytes)) if p]
        if not found:
            lowest = self.at(min(floors, key=lambda price: floors[price]))
            found = [Planned(lowest, planner.solve(lowest.program, nbytes))]
        return min((self._compared(p, min(floors.values())) for p in found), key=lambda p: p.plan.overhead)

    def floor_bytes(self, planner: Planner) -> int:
        """The smallest budget that is accepted, whatever was asked for before."""
        return min(self._floors(planner).values())

    def _floors(self, planner: Planner) -> dict[float, int]:
        """The floors of the two highest prices: where less is stacked, hardly ever more is needed."""
        return {price: planner.floor_bytes(self.at(price).program) for price in self.prices()[-2:]}

    def _worth_trying(self, nbytes: int) -> tuple[float, ...]:
        """The lowest price at which the step fits as it is, and the next lower one; the two highest where none does."""
        prices = self.prices()
        best = min(
            (price for price, peak in self._bisected(prices, nbytes).items() if peak <= nbytes), default=prices[-1]
        )
        return max((p for p in prices if p < best), default=best), best

    def prices(self) -> list[float]:
        """Prices at which the step differs, ascending; 0 is the first."""
        self.at(0.0)
        edges = sorted({edge for _, choices in self._choices.values() for edge in breakpoints(choices)})
        step = max(1, len(edges) // _MOST_PRICES)
        return [0.0, *edges[::-step][::-1]]

    def _bisected(self, prices: Sequence[float], nbytes: int) -> dict[float, int]:
        """Peaks of the step as it is, at prices on the way to the lowest at which it fits. O(log prices) recordings.

        Peaks hardly ever grow with the price: what is estimated for a scan alone is not quite what the step takes.
        """
        peaks = dict[float, int]()
        low, high = 0, len(prices) - 1
        while True:
            middle = high if not peaks else (low + high) // 2
            peaks[prices[middle]] = simulate(self.at(prices[middle]).program).peak_bytes
            if peaks[prices[middle]] <= nbytes:
                high = middle
            else:
                low = middle + 1
            if low >= high:
                return peaks

    def _tried(self, price: float, nbytes: int, planner: Planner) -> Planned | None:
        try:
            return Planned(self.at(price), planner.solve(self.at(price).program, nbytes))
        except InfeasibleBudget:
            return None

    def _compared(self, planned: Planned, floor_bytes: int) -> Planned:
        """The plan with its cost against the step where bytes cost nothing, and with the floor of all prices."""
        plain, plan = self.plain.program, planned.plan
        plan = replace(plan, floor_bytes=floor_bytes, lower_bound=0.0)
        if planned.recorded is self.plain or not plain.seconds:
            return replace(planned, plan=plan)
        overhead = max(0.0, plan.program.seconds * (1 + plan.overhead) / plain.seconds - 1)
        peak = max(simulate(plain).peak_bytes, plan.plain_peak_bytes)
        figures = replace(plan, overhead=overhead, plain_peak_bytes=peak, plain_seconds=plain.seconds)
        return replace(planned, plan=figures)

    def _rule(self, price: float) -> Callable[[Any, Sequence[Any]], Sequence[Any]]:
        """How scans run at a price."""

        def rule(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
            shape, closed = shape_of(eqn), eqn.params["jaxpr"]
            body = with_scans(closed, rule)

            def choose(is_differentiated: Sequence[bool]) -> Choice:
                return chosen(self._choices_for(shape, closed, body, is_differentiated, price), price)

            return scanned(shape, body, inputs, as_it_is(eqn), choose)

        return rule

    def _choices_for(
        self, shape: Shape, closed: Any, body: Flat, is_differentiated: Sequence[bool], price: float
    ) -> list[Choice]:
        wanted = tuple(differentiated_in_body(shape, closed, is_differentiated))
        key = id(closed), wanted, price if has_scans(closed) else 0.0
        if key not in self._choices:
            recorded = record(body, closed.in_avals, wanted, Names(f"body of a scan of {self._names.step}"))
            self._choices[key] = closed, choices_of(recorded, shape)
        return self._choices[key][1]


def _as_traced(closed: Any) -> Flat:
    return lambda *arrays: list(jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *arrays))


def differentiated_in_body(shape: Shape, closed: Any, is_differentiated: Sequence[bool]) -> list[bool]:
    """Which inputs of a scan's body are differentiated: a carry is, once anything that it is made of is."""
    graph = graph_of(closed)
    wanted = [d and is_inexact(graph.avals[v]) for d, v in zip(is_differentiated, graph.inputs, strict=True)]
    while True:
        depends = {v for v, w in zip(graph.inputs, wanted, strict=True) if w}
        for equation in graph.equations:
            if not depends.isdisjoint(equation.operands):
                depends.update(equation.results)
        grown = list(wanted)
        for k in range(shape.n_carry):
            out, position = graph.outputs[k], shape.n_consts + k
            grown[position] |= out in depends and is_inexact(graph.avals[graph.inputs[position]])
        if grown == wanted:
            return wanted
        wanted = grown
