"""Schedules as the 0-1 points of a linear program: what runs again in which stage, what is carried into the next.

The formulation of Checkmate (Jain et al. 2020, "Checkmate: Breaking the Memory Wall with Optimal Tensor
Rematerialization", equations 1-9), on values with bytes instead of nodes with one output, and with two differences.
A *stage* ends with the first run of a *moment*, an op of the program: of every op (then a point is a schedule), or of
some (then the linear program is a relaxation of every schedule, several moments of the bound in ``bounds`` at once).
And instead of Checkmate's sums and products that say when a value is freed (equations 5-8), a value counts at a
rerun when it is carried into the next stage or read by a run from there on, which takes no products and gives a tighter
relaxation.

Columns: ``again[w, i]``, op i runs again in stage w; ``carried[w, v]``, value v is in memory when stage w begins. Rows:
what a run reads is carried in or made in the same stage; what is carried on, likewise; the bytes at every moment fit
into the budget. ``Stages.inside`` adds the rows for the bytes at the reruns of one stage, in which ops run in
program order. Without them the linear program relaxes *every* schedule, whatever the order and the number of runs
within a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from autoremat.planner import clock
from autoremat.program import Program

Floats = npt.NDArray[np.float64]

_INFEASIBLE: Final = 2

_ENTRIES_A_SECOND: Final = 6e8
"""Entries of the matrix times steps of the simplex algorithm that a second of work goes through."""

_ROOT_SECONDS, _NODE_SECONDS = 2.5e-5, 5e-6
"""What an entry of an integer program's matrix counts as work: at the first node of the search, and at each further."""

ZERO: Final = 0
ONE: Final = 1
"""Two columns that are always 0 and 1, so that every quantity is a column."""


@dataclass(frozen=True)
class Relaxed:
    """The optimum of a linear program over fractions.

    Attributes:
        cost: no point, whole or not, costs less; ``inf`` when there is none.
        reduced: for every column by how much at least the cost grows when it is 1 instead of 0 (negative: when it is
            0 instead of 1).
        point: where it is, as far as the solver's tolerances go.
    """

    cost: float
    reduced: Floats
    point: Floats


@dataclass(frozen=True)
class Whole:
    """What is known of the optimum over whole numbers.

    Attributes:
        bound: no whole point costs less, to a millionth; ``inf`` when there is none.
        point: the best one found.
    """

    bound: float
    point: Floats | None


@dataclass
class Table:
    """A linear program that grows: minimise ``cost @ x`` under rows of ``coefficients @ x <= most``."""

    cost: list[float] = field(default_factory=lambda: [0.0, 0.0])
    low: list[float] = field(default_factory=lambda: [0.0, 1.0])
    high: list[float] = field(default_factory=lambda: [0.0, 1.0])
    whole: list[int] = field(default_factory=lambda: [0, 0])
    most: list[float] = field(default_factory=list)
    _rows: list[int] = field(default_factory=list)
    _columns: list[int] = field(default_factory=list)
    _coefficients: list[float] = field(default_factory=list)

    def column(self, cost: float = 0.0, *, whole: bool = True) -> int:
        """A new variable between 0 and 1."""
        for values, x in ((self.cost, cost), (self.low, 0.0), (self.high, 1.0)):
            values.append(x)
        self.whole.append(int(whole))
        return len(self.cost) - 1

    def row(self, terms: Sequence[tuple[float, int]], most: float) -> None:
        """Demand that the sum of ``coefficient * column`` is at most ``most``."""
        self._rows += [len(self.most)] * len(terms)
        self._columns += [c for _, c in terms]
        self._coefficients += [a for a, _ in terms]
        self.most.append(most)

    def below(self, column: int, *others: int) -> None:
        """Demand that ``column`` is at most the sum of the others, unless that is plain."""
        if column != ZERO and column not in others and ONE not in others:
            self.row([(1.0, column), *((-1.0, c) for c in others if c != ZERO)], 0.0)

    def matrix(self) -> Any:
        """The coefficients, one row per constraint."""
        from scipy.sparse import csr_matrix  # here: a first plan needs none, and scipy takes longer than it does

        shape = (len(self.most), len(self.cost))
        return csr_matrix((self._coefficients, (self._rows, self._columns)), shape=shape)

    def relax(self, seconds: float) -> Relaxed | None:
        """The optimum over fractions (HiGHS); None when the time is over."""
        from scipy.optimize import linprog

        matrix, box = self.matrix(), np.stack([self.low, self.high], axis=1)
        per_step = max(1, matrix.nnz) / _ENTRIES_A_SECOND
        options = {**clock.relaxation_limits(clock.left()), "maxiter": _whole_number(seconds / per_step)}
        found = linprog(self.cost, A_ub=matrix, b_ub=self.most, bounds=box, method="highs-ds", options=options)
        clock.spend(per_step * found.nit)
        clock.is_over(closely=True)
        if found.status == _INFEASIBLE:
            return Relaxed(inf, np.zeros(len(self.cost)), np.zeros(len(self.cost)))
        if found.status != 0:
            return None
        # Any multipliers give a bound (weak duality), so the tolerances of the solver cannot make this one wrong.
        prices = np.minimum(found.ineqlin.marginals, 0.0)
        reduced = np.array(self.cost) - matrix.T @ prices
        slack = np.where(reduced < 0, reduced * box[:, 1], reduced * box[:, 0]).sum()
        return Relaxed(float(prices @ np.array(self.most) + slack), reduced, found.x)

    @property
    def entries(self) -> int:
        """How many coefficients there are."""
        return len(self._coefficients)

    def solve(
        self, seconds: float, *, low: Floats | None = None, high: Floats | None = None, nodes: int | None = None,
        each: tuple[float, float] = (_ROOT_SECONDS, _NODE_SECONDS),
    ) -> Whole:  # fmt: skip
        """The optimum over whole numbers (HiGHS), or how far it got in the nodes of the search.

        What the search takes is counted in nodes, so that it ends at the same one on any machine; real time cuts it
        only where all planning has to end.

        Args:
            seconds: work, of a nominal machine; where not even the first node fits into it, nothing is looked for.
            low: narrower lower limits of the columns.
            high: narrower upper limits.
            nodes: further limit of the search.
            each: what an entry of the matrix counts as work, at the first node and at each further one.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        matrix = self.matrix()
        root, node = each[0] * matrix.nnz, each[1] * max(1, matrix.nnz)
        if root > seconds:
            return Whole(0.0, None)
        limits: dict[str, float] = {**clock.search_limits(clock.left()), "mip_rel_gap": 0.0}
        most = min(limits.get("node_limit", inf), inf if nodes is None else nodes, 1 + (seconds - root) / node)
        found = milp(
            np.array(self.cost),
            integrality=np.array(self.whole),
            bounds=Bounds(self.low if low is None else low, self.high if high is None else high),
            constraints=LinearConstraint(matrix, -np.inf, np.array(self.most)),
            options=limits | {"node_limit": _whole_number(most)},
        )
        clock.spend(min(seconds, root + node * (found.mip_node_count or 0)))
        clock.is_over(closely=True)
        if found.status == _INFEASIBLE:
            return Whole(inf, None)
        bound = found.mip_dual_bound
        return Whole(bound if bound is not None and bound > -inf else 0.0, found.x)


def _whole_number(number: float) -> int:
    return int(min(1e9, max(1.0, number)))


@dataclass
class Stages:
    """The linear program of one program, one budget and some moments.

    Attributes:
        program: the step.
        budget_bytes: the most bytes at any moment.
        moments: op indices, ascending, the last one the last op.
        where: for every stage, whether ops may run again in it; everywhere when not given.
        unit_seconds: one unit of cost.
    """

    program: Program
    budget_bytes: int
    moments: Sequence[int]
    where: Sequence[bool] | None = None
    unit_seconds: float = 1.0

    def __post_init__(self) -> None:
        self.table = Table()
        self.again: dict[tuple[int, int], int] = {}
        self.carried: dict[tuple[int, int], int] = {}
        self.candidates = [self._candidates(w) for w in range(len(self.moments))]
        self._unit_bytes = self._byte_unit()
        self._needed: dict[tuple[int, int, int], int] = {}
        for w in range(len(self.moments)):
            for i in self.candidates[w]:
                self.again[w, i] = self.table.column(self.program.ops[i].again_seconds / self.unit_seconds)
            self._carry(w)
        for w in range(len(self.moments)):
            self._sources(w)
            self._moment_bytes(w)

    # -- what never changes --------------------------------------------------------------------------------------------

    def first(self, w: int) -> int:
        """The first op of stage ``w``."""
        return self.moments[w - 1] + 1 if w else 0

    @cached_property
    def _reads(self) -> tuple[tuple[int, ...], ...]:
        values = self.program.values
        return tuple(tuple(v for v in op.reads if not values[v].fixed) for op in self.program.ops)

    @cached_property
    def _made(self) -> tuple[int, ...]:
        return tuple(v for v, p in enumerate(self.program.producer) if p >= 0)

    @cached_property
    def _last_need(self) -> tuple[int, ...]:
        """For every value the last op for whose sake it can be in memory, through reruns of its readers, too."""
        program = self.program
        need = [-1] * len(program.values)
        for i in range(len(program.ops) - 1, -1, -1):
            op = program.ops[i]
            until = i if op.once else max([i, *(need[v] for v in op.writes)])
            for v in self._reads[i]:
                need[v] = max(need[v], until)
        return tuple(need)

    @cached_property
    def _overwritten(self) -> dict[int, int]:
        """For every value that is taken over in place, the op that does."""
        return {old: i for i, op in enumerate(self.program.ops) for _, old in op.in_place}

    def _must(self, v: int, t: int) -> bool:
        """Whether every schedule has the value in memory between its first run and that of op ``t``, and then."""
        program, readers = self.program, self.program.readers[v]
        lost = program.ops[program.producer[v]].once and bool(readers) and readers[-1] >= t
        return program.hold[v] >= t or bool(lost)

    def _is_handed(self, v: int, t: int) -> bool:
        """Whether the backward has been handed the value before op ``t`` and uses that copy then or later."""
        asked = (self.program.handed_until[i] for i in self.program.readers[v] if i < t)
        return max(asked, default=-1) >= t

    def _candidates(self, w: int) -> list[int]:
        """The ops that may run again in the stage and could be of use there."""
        program, ops = self.program, self.program.ops
        if self.where is not None and not self.where[w]:
            return []
        begin, moment = self.first(w), self.moments[w]
        there = [v for v in self._made if program.producer[v] < begin and self._must(v, moment)]
        base = program.fixed_bytes + sum(program.values[v].nbytes for v in there)
        return [
            i
            for i in range(moment)
            if not ops[i].once
            and max((self._last_need[v] for v in ops[i].writes), default=-1) >= begin
            and base + self._own_bytes(i, set(there)) <= self.budget_bytes
        ]

    def _own_bytes(self, i: int, there: set[int]) -> int:
        op, values = self.program.ops[i], self.program.values
        own = sum(values[v].nbytes for v in {*self._reads[i], *op.writes} - there) + op.again_scratch_bytes
        return own - sum(min(values[new].nbytes, values[old].nbytes) for new, old in op.in_place)

    def _byte_unit(self) -> float:
        """Bytes per unit in the rows: a solver's tolerance of 1e-6 is then less than a byte up to a terabyte."""
        sizes = [v.nbytes for v in self.program.values] + [
            b for op in self.program.ops for b in (op.scratch_bytes, op.again_scratch_bytes)
        ]
        common = int(np.gcd.reduce([*sizes, self.budget_bytes])) if sizes else 1
        return float(max(1, common, min(100_000, self.budget_bytes // 1000)))

    # -- columns and rows ----------------------------------------------------------------------------------------------

    def _carry(self, w: int) -> None:
        """Columns for what may be in memory when stage ``w`` begins."""
        begin = self.first(w)
        for v in self._made:
            if self.program.producer[v] < begin:
                self.carried[w, v] = self._carried_column(w, v)

    def _carried_column(self, w: int, v: int) -> int:
        begin = self.first(w)
        if self._must(v, begin) or self._is_handed(v, begin):
            return ONE
        if self._last_need[v] < begin or self._overwritten.get(v, -1) == self.moments[w - 1]:
            return ZERO
        before = self.carried.get((w - 1, v), ONE)
        # Nothing happens to the value in the stage before: it may as well have left earlier.
        return before if before != ONE and not self._touched(w - 1, v) else self.table.column()

    def _touched(self, w: int, v: int) -> bool:
        """Whether the value can be made or read in the stage."""
        readers = self.program.readers[v]
        first = any(self.first(w) <= i <= self.moments[w] for i in readers)
        return first or any((w, i) in self.again for i in (self.program.producer[v], *readers))

    def at(self, w: int, v: int) -> int:
        """The column of a value at the beginning of a stage, or at the end of the program."""
        return self.carried.get((w, v), ZERO)

    def _remade(self, w: int, v: int) -> int:
        return self.again.get((w, self.program.producer[v]), ZERO)

    def _available(self, w: int, v: int) -> tuple[int, ...]:
        """Where a value can come from within a stage; its first run in the same stage is always good enough."""
        return (ONE,) if self.program.producer[v] >= self.first(w) else (self.at(w, v), self._remade(w, v))

    def _sources(self, w: int) -> None:
        """What is read and what is carried on must come from somewhere."""
        table = self.table
        for i in self.candidates[w]:
            for u in self._reads[i]:
                table.below(self.again[w, i], *self._available(w, u))
        for u in {u for i in range(self.first(w), self.moments[w] + 1) for u in self._reads[i]}:
            table.below(ONE, *self._available(w, u))
        for v in self._made:
            if self.program.producer[v] <= self.moments[w]:
                table.below(self.at(w + 1, v), *self._available(w, v))
            here, made = self.at(w, v), self._remade(w, v)
            if made != ZERO and here not in (ZERO, ONE):
                table.row([(1.0, here), (1.0, made)], 1.0)

    def _moment_bytes(self, w: int) -> None:
        """At the first run of a moment: what it needs and what is carried on."""
        program, t = self.program, self.moments[w]
        op, values = program.ops[t], program.values
        there = {v for v in self._made if program.producer[v] <= t and program.hold[v] >= t}
        there.update(self._reads[t], op.writes)
        used = program.fixed_bytes + op.scratch_bytes + sum(values[v].nbytes for v in there)
        used -= sum(min(values[new].nbytes, values[old].nbytes) for new, old in op.in_place)
        beside = [(values[v].nbytes, self.at(w + 1, v)) for v in self._made if v not in there]
        self._bytes_row([(float(b), c) for b, c in beside], used)

    def _bytes_row(self, terms: Sequence[tuple[float, int]], used: int) -> None:
        used += sum(int(b) for b, c in terms if c == ONE)
        terms = [(b / self._unit_bytes, c) for b, c in terms if c not in (ZERO, ONE) and b]
        free = (self.budget_bytes - used) / self._unit_bytes
        if sum(max(b, 0.0) for b, _ in terms) > free:
            self.table.row(terms, free)

    def since(self, w: int, until: int | None = None) -> None:
        """Add rows that look at the stages from ``w`` up to ``until``, or all later ones, at once.

        Whatever runs again in them does so *at least once*. A relaxed schedule may run an op half a time in two stages
        and its sources half a time in one; it is now at least as dear as the minimum cut of ``bounds`` at that moment.
        """
        begin, table = self.first(w), self.table
        last = len(self.moments) - 1 if until is None else until
        ever = {i: [self.again[x, i] for x in range(w, last + 1) if (x, i) in self.again] for i in range(begin)}
        once = {i: table.column(whole=False) for i, columns in ever.items() if columns}
        for i, column in once.items():
            table.below(column, *ever[i])
        reads = {u for i in range(begin, self.moments[last] + 1) for u in self._reads[i]}
        needs = [(ONE, u) for u in reads] + [(c, u) for i, c in once.items() for u in self._reads[i]]
        for column, u in [*needs, *((self.at(last + 1, v), v) for v in self._made)]:
            producer = self.program.producer[u]
            if producer < begin:
                table.below(column, self.at(w, u), once.get(producer, ZERO))

    # -- within a stage ------------------------------------------------------------------------------------------------

    def inside(self, w: int) -> None:
        """Add the rows for the bytes at the reruns of a stage of one op."""
        for i in self.candidates[w]:
            self._run_bytes(w, i)

    def _run_bytes(self, w: int, i: int) -> None:
        """Bytes at the rerun of op ``i``; where it does not run, no more than at the next one that does."""
        program, op, values = self.program, self.program.ops[i], self.program.values
        t = self.moments[w]
        held = {v for v in self._made if program.producer[v] < self.first(w) and program.hold[v] >= t}
        held |= {v for v in self._made if self._is_handed(v, t)}
        terms = [(float(op.again_scratch_bytes), self.again[w, i])]
        for v in self._made:
            producer, nbytes = program.producer[v], float(values[v].nbytes)
            if producer == i:
                terms.append((nbytes, self.again[w, i]))
            elif producer < self.first(w) and v not in held:
                terms.append((nbytes, self.at(w, v) if producer > i else self._needed_from(w, v, i)))
        for new, old in op.in_place:
            if old not in held:
                terms.append((-float(min(values[new].nbytes, values[old].nbytes)), self._takes_over(w, i, old)))
        self._bytes_row(terms, program.fixed_bytes + sum(values[v].nbytes for v in held))

    def _needed_from(self, w: int, v: int, k: int) -> int:
        """A column that is 1 when a run from op ``k`` on reads the value in the stage, or it is carried on."""
        if v in self._reads[self.moments[w]]:
            return ONE
        readers = [i for i in self.program.readers[v] if i >= k and (w, i) in self.again]
        last = self.at(w + 1, v)
        for i in reversed(readers):
            last = self._either(w, v, i, last)
        return last

    def _either(self, w: int, v: int, i: int, later: int) -> int:
        """A column of at least ``again[w, i]`` and at least ``later``."""
        if later == ONE:
            return ONE
        if later == ZERO:
            return self.again[w, i]
        if (w, v, i) not in self._needed:
            column = self._needed[w, v, i] = self.table.column(whole=False)
            self.table.below(self.again[w, i], column)
            self.table.below(later, column)
        return self._needed[w, v, i]

    def _takes_over(self, w: int, k: int, old: int) -> int:
        """A column that is 1 when the rerun of ``k`` takes over a storage that is needed no more."""
        later = self._needed_from(w, old, k + 1)
        if later == ONE:
            return ZERO
        column = self.table.column(whole=False)
        self.table.below(column, self.again[w, k])
        if later != ZERO:
            self.table.row([(1.0, column), (1.0, later)], 1.0)
        return column

    # -- points --------------------------------------------------------------------------------------------------------

    def order(self, point: Floats) -> list[int]:
        """The runs of a whole point, in program order within every stage."""
        runs: list[int] = []
        for w in range(len(self.moments)):
            runs += [i for i in self.candidates[w] if point[self.again[w, i]] > 0.5]
            runs += range(self.first(w), self.moments[w] + 1)
        return runs
