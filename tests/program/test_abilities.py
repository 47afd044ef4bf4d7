"""What an engine can carry out, and what decisions can say of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.planner import SOLVERS, solve
from autoremat.program import (
    Abilities,
    Decision,
    Free,
    InfeasibleBudget,
    Program,
    Run,
    Schedule,
    beyond_decisions,
    decisions_of,
    simulate,
    verify,
)
from autoremat.program.errors import InvalidProgram, InvalidSchedule
from tests.fixed import examples
from tests.planner.chains import chain, gpt
from tests.strategies import orders, programs


def able(program: Program, most_runs: int) -> Program:
    """The same, recorded by an engine that runs every op so often at most."""
    return replace(program, abilities=replace(program.abilities, most_runs=most_runs))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("most_runs", [1, 2, 3])
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_auto_obeys(most_runs: int, share: float) -> None:
    program = able(chain(24), most_runs)
    try:
        plan = solve(program, share, time_limit_seconds=2.0)
    except InfeasibleBudget as error:
        assert error.floor_bytes > share * simulate(program).peak_bytes  # noqa: PT017 - the plan is what is looked at
        assert most_runs < 3
        return
    assert max(plan.schedule.runs_of.values()) <= most_runs
    assert verify(program, plan) == ()


@examples(40)
@given(program=programs(), most_runs=st.integers(1, 3), share=st.floats(0.3, 1.0), solver=st.sampled_from(SOLVERS))
def test_no_solver_gives_what_the_engine_cannot_run(
    program: Program, most_runs: int, share: float, solver: str
) -> None:
    program = able(program, most_runs)
    try:
        plan = solve(program, share, solver=solver, time_limit_seconds=1.0)
    except (InfeasibleBudget, ValueError):
        return
    assert verify(program, plan) == ()


def test_the_judge_counts_runs() -> None:
    program = able(chain(4), 2)
    schedule = Schedule.from_order(program, [0, 1, 0, 1, 0, 1, *range(2, len(program.ops))])
    found = [v for v in verify(program, schedule) if v.rule == "runs allowed"]
    assert [v.op for v in found] == ["0 (f0)", "1 (f1)"]
    assert "the op runs 3 times; the engine can run it 2 times" in str(found[0])


def test_a_solver_that_runs_ops_too_often_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"solver 'revolve' makes a schedule that the engine of 'chain24' cannot carry out: it can run each op 2",
    ):
        solve(able(chain(24), 2), 0.3, solver="revolve")


def by_decisions(program: Program) -> Program:
    """The same, recorded by an engine that keeps a value or computes it again."""
    return replace(program, abilities=Abilities("by decisions"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("share", [0.8, 0.3, 0.0])
@pytest.mark.parametrize("program", [chain(24), chain(7)], ids=["24", "7"])
def test_auto_keeps_to_decisions(program: Program, share: float) -> None:
    program = by_decisions(program)
    plain = solve(program, 1.0)
    budget = plain.floor_bytes + int(share * (plain.peak_bytes - plain.floor_bytes))
    plan = solve(program, budget, time_limit_seconds=2.0)
    assert plan.overhead > 0
    assert beyond_decisions(plan.program, plan.schedule) == ()
    assert verify(plan.program, plan) == ()


@examples(40)
@given(program=programs(), share=st.floats(0.3, 1.0), solver=st.sampled_from(SOLVERS))
def test_no_solver_goes_beyond_decisions(program: Program, share: float, solver: str) -> None:
    program = by_decisions(program)
    try:
        plan = solve(program, share, solver=solver, time_limit_seconds=1.0)
    except (InfeasibleBudget, ValueError):
        return
    assert verify(program, plan) == ()
    assert beyond_decisions(program, plan.schedule) == ()


@given(st.data())
def test_the_judge_and_the_reader_of_decisions_agree(data: st.DataObject) -> None:
    program = by_decisions(data.draw(programs()))
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    found = [v for v in verify(program, schedule) if v.rule == "reruns by decisions"]
    assert bool(found) == bool(beyond_decisions(program, schedule))


def test_further_runs_stand_ahead_of_asks() -> None:
    program = gpt(1)
    assert program.abilities.reruns == "at asks"
    again = next(i for i, op in enumerate(program.ops) if op.once is None)
    order = list(range(len(program.ops)))
    end = next(i for i, op in enumerate(program.ops) if op.phase == "backward" and op.kind == "op")
    order.insert(end, again)
    rules = {v.rule for v in verify(program, Schedule.from_order(program, order))}
    assert "reruns at asks" in rules
    anywhere = replace(program, abilities=Abilities("anywhere"))
    assert "reruns at asks" not in {v.rule for v in verify(anywhere, Schedule.from_order(anywhere, order))}


def test_abilities_are_in_the_file() -> None:
    program = able(gpt(1), 2)
    assert Program.from_json(program.to_json()) == program
    assert "abilities" not in gpt(1).to_json()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reruns", "never", "one of anywhere, at asks"),
        ("most_runs", 0, "a positive integer"),
        ("ordered", 1, "true or false"),
    ],
)
def test_abilities_in_a_file_are_checked(field: str, value: object, message: str) -> None:
    import json

    data = json.loads(able(gpt(1), 2).to_json())
    data["abilities"][field] = value
    with pytest.raises(InvalidProgram, match=message):
        Program.from_json(data)


@given(st.data())
def test_actions_are_the_schedule(data: st.DataObject) -> None:
    program = data.draw(programs())
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    assert Schedule.of_actions(schedule.actions) == schedule
    assert sum(isinstance(a, Run) for a in schedule.actions) == len(schedule.order)


def test_nothing_is_freed_before_anything_has_run() -> None:
    with pytest.raises(InvalidSchedule, match="value 3 is freed before anything has run"):
        Schedule.of_actions([Free(3), Run(0)])


@given(st.data())
def test_what_decisions_say_can_be_carried_out_by_them(data: st.DataObject) -> None:
    """Where nothing is beyond them, an engine that knows nothing else runs no op again that the schedule does not."""
    program = data.draw(programs())
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    if beyond_decisions(program, schedule):
        return
    again = carried_out(program, decisions_of(program, schedule))
    assert again <= {i for i, n in schedule.runs_of.items() if n == 2}


def carried_out(program: Program, decided: Mapping[str, Decision]) -> set[int]:
    """The ops that run again where nothing but decisions is known: whatever a reader of the backward misses."""
    there = {v for v in range(len(program.values)) if program.producer[v] < 0}
    again: set[int] = set()

    def need(v: int) -> None:
        if v in there:
            return
        i = program.producer[v]
        for read in program.ops[i].reads:
            need(read)
        again.add(i)
        there.update(program.ops[i].writes)

    begun = False
    for op in program.ops:
        if op.phase == "backward" and not begun:
            begun = True
            there -= {v for v, value in enumerate(program.values) if decided.get(value.id) is Decision.RECOMPUTE}
        for v in op.reads if begun else ():
            need(v)
        there.update(op.writes)
    return again


def test_plain_training_keeps_all_that_is_read() -> None:
    program = gpt(2)
    assert set(decisions_of(program, Schedule.plain(program)).values()) == {Decision.KEEP}
    assert beyond_decisions(program, Schedule.plain(program)) == ()
