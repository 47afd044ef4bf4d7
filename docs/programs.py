"""Write the page of the public benchmark: its table, and how to submit. Run: ``python -m docs.programs``."""

from __future__ import annotations

from pathlib import Path

from autoremat.bench.catalog import Best, Catalog, Task

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "programs.md"
FOLDER = ROOT / "benchmarks" / "programs"

TEXT = """# A public benchmark

`benchmarks/programs` has {count} programs of {kinds} kinds, {fewest} to {most} ops: chains, unrolled recurrences,
random layered graphs, training graphs of known networks, and recorded training steps, {zoo} of them of models of the
zoo, with estimated seconds. Each has five budgets, at 5, 20, 40, 60 and 80 % of the way from the smallest known peak to
the plain one; and for each the smallest extra time that is known, the largest bound, and who found them. Their format
is that of [the program file](program-file.md), compressed by xz.

## Run a solver

```sh
autoremat bench auto --only layered
autoremat bench autoremat.planner.solvers.dtr:schedule
```

A row for each budget: extra time, bound, the best that is known, seconds. A solver is one of `autoremat solve`, or a
function of yours, `schedule(program, budget_bytes, *, deadline)`, which returns a `Schedule`; one whose peak is above
the budget counts as none. `--effort` counts work in place of time, so that the rows are the same on any machine. The
exit code is 5 where the judge has refused something.

## The judge

`src/autoremat/bench/judge.py` imports nothing of autoremat: the JSON of a program, an order of runs and what leaves
after each go in; peak, extra time and whatever cannot be carried out come out. `autoremat.verify` is asked as well,
for the rules of calls and of the backward. Both share no code with any solver. An extra time below a bound, or a bound
above an extra time, is refused, whoever claims it. `tests/bench/test_entries.py` checks some entries by hand: three by
the recursion of Griewank and Walther, four by adding up intervals.

## Submit

1. `autoremat bench my_package.planning:schedule --update --by "Name, year"` writes what is better than known into
   `table.json`, and its schedule into `schedules`. Bounds come with the plans of our own solvers; for another one
   change `bound` and `bound_by`, and say in the change how it was found.
2. `pytest tests/bench` asks the judge about all entries.
3. `python -m docs.programs` writes this page. One change with the three.

## The table

{best} of {budgets} budgets are solved within 0.1 points of the bound, {near} within 1 point. Extra time and, after the
bar, the bound, in per cent of the plain step's seconds; a dash: nothing known. Found by {finders}.

| program | kind | ops | 5 % | 20 % | 40 % | 60 % | 80 % |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def page(catalog: Catalog) -> str:
    """The page for what is known."""
    found = [best for task in catalog.tasks for best in task.budgets]
    gaps = [best.overhead - best.bound for best in found if best.overhead is not None]
    finders = sorted({best.by for best in found if best.by})
    return TEXT.format(
        count=len(catalog.tasks),
        kinds=len({task.kind.split(",")[0] for task in catalog.tasks}),
        zoo=sum(task.kind.startswith("zoo") for task in catalog.tasks),
        fewest=f"{min(task.ops for task in catalog.tasks):,}",
        most=f"{max(task.ops for task in catalog.tasks):,}",
        budgets=len(found),
        best=sum(gap <= 0.001 for gap in gaps),
        near=sum(gap <= 0.01 for gap in gaps),
        finders="; ".join(finders) or "nobody yet",
        rows="\n".join(map(_row, catalog.tasks)),
    )


def _row(task: Task) -> str:
    cells = " | ".join(map(_cell, task.budgets))
    return f"| {task.title} | {task.kind} | {task.ops:,} | {cells} |"


def _cell(best: Best) -> str:
    if best.overhead is None:
        return "-"
    return f"{100 * best.overhead:.2f} \\| {100 * best.bound:.2f}"


if __name__ == "__main__":
    PAGE.write_text(page(Catalog.at(FOLDER)), encoding="utf-8")
