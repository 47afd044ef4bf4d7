"""Random layered graphs by constraint programming: what a CP-SAT model of retention intervals finds beside ``solve``.

The model is that of Moccasin (Bartan et al. 2023): a node has a few copies, each with the stage in which it runs and
the time up to which it stays; the intervals are under one cumulative limit; every run reads a copy that is there. It
has all schedules that run an op a few times, with reruns in program order ahead of a first run. It starts
from the plan of ``solve`` unless told ``--cold``, so it can only be as good or better.
Needs OR-Tools, which autoremat does not: ``pip install ortools``.
Run: ``python benchmarks/layered_cpsat.py NODES SEED SHARE SECONDS [--cold]``.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from ortools.sat.python import cp_model

from autoremat import Program, Schedule, simulate, solve
from autoremat.planner.solving import LIMIT_SECONDS
from benchmarks.layered import SECONDS, layered_graph

COPIES = 3
"""Of a value, the first included, at least; as many as the plan has where that has more."""


class Model:
    """The model of one program and budget.

    Args:
        program: whose ops write one value each and may all run again.
        budget_bytes: of the peak.
        copies: of a value at most.
    """

    def __init__(self, program: Program, budget_bytes: int, copies: int) -> None:
        self.copies, self.program, self.model = copies, program, cp_model.CpModel()
        self.n = n = len(program.ops)
        self.end = n * (n + 1) // 2
        self.active: dict[tuple[int, int], cp_model.IntVar] = {}
        self.start: dict[tuple[int, int], cp_model.IntVar] = {}
        self.stop: dict[tuple[int, int], cp_model.IntVar] = {}
        self.chosen: dict[tuple[int, int, int, int], cp_model.IntVar] = {}
        intervals, bytes_of = [], []
        for i in range(n):
            for c in range(copies if i + 1 < n else 1):
                intervals.append(self._copy(i, c))
                bytes_of.append(program.values[program.ops[i].writes[0]].nbytes)
        self.model.add_cumulative(intervals, bytes_of, budget_bytes)
        for i, c in self.active:
            for v in program.ops[i].reads:
                self._read(i, c, program.producer[v])
        for v, value in enumerate(program.values):
            if program.hold[v] >= 0 and value.held is not None:
                self.model.add(self.stop[program.producer[v], 0] == self.end)
        seconds = [round(op.again_seconds / program.seconds * 1e7) for op in program.ops]
        self.model.minimize(sum(seconds[i] * a for (i, c), a in self.active.items() if c))

    def at(self, stage: int, i: int) -> int:
        """The time at which op ``i`` would run in a stage."""
        return stage * (stage + 1) // 2 + i

    def _copy(self, i: int, c: int) -> cp_model.IntervalVar:
        model, key = self.model, (i, c)
        self.active[key] = active = model.new_bool_var(f"a{i}_{c}")
        first = self.at(i, i)
        if c:
            stages = cp_model.Domain.from_values([self.at(j, i) for j in range(i + c, self.n)] or [self.end])
            self.start[key] = start = model.new_int_var_from_domain(stages, f"s{i}_{c}")
        else:
            self.start[key] = start = model.new_constant(first)
            model.add(active == 1)
        self.stop[key] = stop = model.new_int_var(first + 1, self.end, f"e{i}_{c}")
        length = model.new_int_var(1, self.end, f"l{i}_{c}")
        if c:
            model.add_implication(active, self.active[i, c - 1])
            model.add(start >= self.stop[i, c - 1]).only_enforce_if(active)
        return model.new_optional_interval_var(start, length, stop, active, f"i{i}_{c}")

    def _read(self, i: int, c: int, u: int) -> None:
        """Every run of ``i`` reads a copy of what ``u`` makes that is there: its interval reaches beyond the run."""
        model, sources = self.model, []
        for k in range(self.copies):
            self.chosen[i, c, u, k] = chosen = model.new_bool_var(f"r{i}_{c}_{u}_{k}")
            model.add_implication(chosen, self.active[u, k])
            model.add(self.start[u, k] < self.start[i, c]).only_enforce_if(chosen)
            model.add(self.stop[u, k] > self.start[i, c]).only_enforce_if(chosen)
            sources.append(chosen)
        model.add_bool_or([*sources, self.active[i, c].negated()])

    def hint(self, schedule: Schedule) -> None:
        """Start from a schedule."""
        starts, stops, stage = defaultdict[int, list[int]](list), dict[tuple[int, int], int](), 0
        for i in schedule.order:
            now = self.at(max(stage, i), i)
            for v in self.program.ops[i].reads:
                u = self.program.producer[v]
                k = len(starts[u]) - 1
                stops[u, k] = now + 1
                for other in range(self.copies):
                    self.model.add_hint(self.chosen[i, len(starts[i]), u, other], other == k)
            stops[i, len(starts[i])] = now + 1
            starts[i].append(now)
            stage = max(stage, i + 1)
        for (i, c), active in self.active.items():
            there = c < len(starts[i])
            self.model.add_hint(active, there)
            if there and c:
                self.model.add_hint(self.start[i, c], starts[i][c])
            if there:
                is_held = c == 0 and self.program.hold[self.program.ops[i].writes[0]] >= self.n - 1
                self.model.add_hint(self.stop[i, c], self.end if is_held else stops[i, c])

    def schedule(self, solver: cp_model.CpSolver) -> Schedule:
        """What has been found."""
        runs = sorted((solver.value(self.start[key]), key[0]) for key, a in self.active.items() if solver.value(a))
        return Schedule.from_order(self.program, [i for _, i in runs])


def main(n: int, seed: int, share: float, seconds: float, *, cold: bool) -> None:
    """Print what is found."""
    program = layered_graph(n, seed)
    plain = simulate(program).peak_bytes
    limit = SECONDS.get(n, 60.0)
    plan = solve(program, share, time_limit_seconds=10 * limit, effort=limit / LIMIT_SECONDS)
    model = Model(program, int(share * plain), max(COPIES, *plan.schedule.runs_of.values()))
    if not cold:
        model.hint(plan.schedule)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds, solver.parameters.num_workers = seconds, 1
    status = solver.solve(model.model)
    found = "nothing"
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        timeline = simulate(program, model.schedule(solver))
        fits = "fits" if timeline.peak_bytes <= int(share * plain) else "DOES NOT FIT"
        found = f"{timeline.extra_seconds / program.seconds:.3%} ({fits})"
    print(f"{n:5d} {seed:4d} {share:6.0%}  plan {plan.overhead:.3%}  bound {plan.lower_bound:.3%}  CP-SAT, "
          f"{seconds:g} s{', cold' if cold else ''}: {found}, {solver.status_name(status).lower()}, its bound "
          f"{solver.best_objective_bound / 1e7:.3%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), cold="--cold" in sys.argv)
