"""``verify`` accepts what can be carried out, and names the rule, run, op and value of whatever cannot."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoremat.program import (
    END,
    Abilities,
    InvalidSchedule,
    Op,
    Plan,
    Program,
    Schedule,
    Value,
    Violation,
    simulate,
    verify,
)
from autoremat.program import verify as _verify_function
from autoremat.program.abilities import Reruns
from autoremat.program.tier_judge import Tier
from autoremat.program.verifier import MOST_VIOLATIONS, RULES
from tests.program.hand import CHAIN_AGAIN, RULES_OF_OFFLOAD, chain, chain_plan, handed, in_place, linear, split
from tests.strategies import abilities, orders, programs

AGAIN = Schedule.from_order(chain(), CHAIN_AGAIN)  # frees: - a - bc - a,db,da
COPY = Schedule.from_order(in_place(), (0, 1, 2, 0, 2, 1, 3))


def held() -> Program:
    """``a`` is held until ``g`` has run, ``b`` to the end."""
    values = (Value("x", 1, fixed=True), Value("a", 1, held=1), Value("b", 1, held=END))
    return Program("held", values, (Op("f", (0,), (1,)), Op("g", (0,), (2,)), Op("h", (0,), ())))


ACCEPTED = {
    "handed and made again beside it": (handed(), Schedule.from_order(handed(), (0, 1, 2, 0, 3, 4))),
    "plain": (chain(), Schedule.plain(chain())),
    "again": (chain(), AGAIN),
    "in place": (in_place(), Schedule.plain(in_place())),
    "in place on a copy": (in_place(), COPY),
    "in place, further run taken over": (in_place(), Schedule.from_order(in_place(), (0, 1, 2, 0, 1, 2, 3))),
    "written while held": (split(), Schedule.from_order(split(), (0, 1, 0, 2))),
    "held": (held(), Schedule.plain(held())),
    "held to the end and not freed": (held(), Schedule((0, 1, 2), ((), (1,), ()))),
    "nothing": (Program("nothing", (), ()), Schedule((), ())),
}


@pytest.mark.parametrize(("program", "schedule"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts(program: Program, schedule: Schedule) -> None:
    assert verify(program, schedule) == ()


NOT_READY = "the op reads it, but the call that made it again had not come to where it can hand it out"

BROKEN = {
    "ops exist": (
        chain(),
        Schedule((*AGAIN.order, 9), (*AGAIN.frees, ())),
        [("ops exist", 6, "", "", "there is no op 9; the program has 5 ops")],
    ),
    "ops exist, negative": (
        chain(),
        Schedule((*AGAIN.order, -1), (*AGAIN.frees, ())),
        [("ops exist", 6, "", "", "there is no op -1; the program has 5 ops")],
    ),
    "every op runs": (
        chain(),
        Schedule((0, 1, 2, 3), ((), (1,), (), (2, 3, 4))),
        [("every op runs", -1, "4 (g1)", "", "the op never runs")],
    ),
    "order kept": (
        held(),
        Schedule((1, 0, 2), ((), (1,), (2,))),
        [("order kept", 1, "0 (f)", "", "the op runs for the first time, but op 1 (g) already has")],
    ),
    "repeatable": (
        chain(),
        Schedule((0, 1, 2, 3, 3, 4), ((), (), (), (), (2, 3), (1, 4, 5))),
        [
            (
                "repeatable",
                4,
                "3 (g2)",
                "",
                "the op must not run again (it belongs to the backward), but it ran in run 3",
            )
        ],
    ),
    "reads are resident": (
        chain(),
        Schedule((0, 1, 2, 3, 4), ((), (1,), (), (2, 3), (1, 4, 5))),
        [("reads are resident", 4, "4 (g1)", "a", "the op reads it, but it is not in memory")],
    ),
    "frees are of resident values": (
        chain(),
        Schedule((0, 1, 2, 3, 4), ((4,), (), (), (2, 3), (1, 4, 5))),
        [("frees are of resident values", 0, "0 (f0)", "db", "it is freed, but it is not in memory")],
    ),
    "frees are of resident values, twice after one run": (
        chain(),
        Schedule((0, 1, 2, 3, 4), ((), (), (), (2, 3, 2), (1, 4, 5))),
        [("frees are of resident values", 3, "3 (g2)", "b", "it is freed twice after the same run")],
    ),
    "frees are of resident values, no value": (
        chain(),
        Schedule((0, 1, 2, 3, 4), ((), (), (), (2, 3), (1, 4, 5, 6))),
        [("frees are of resident values", 4, "4 (g1)", "number 6", "it is freed, but it is not in memory")],
    ),
    "fixed values stay": (
        chain(),
        Schedule((0, 1, 2, 3, 4), ((0,), (), (), (2, 3), (1, 4, 5))),
        [("fixed values stay", 0, "0 (f0)", "x", "it is fixed, but it is freed")],
    ),
    "held values stay": (
        held(),
        Schedule((0, 1, 2), ((1,), (), (2,))),
        [("held values stay", 0, "0 (f)", "a", "it is held until op 1 (g) has run, but it is freed before")],
    ),
    "held values stay, to the end": (
        held(),
        Schedule((0, 1, 2), ((), (1, 2), ())),
        [("held values stay", 1, "1 (g)", "b", "it is held until op 2 (h) has run, but it is freed before")],
    ),
    "held values stay, although written again": (
        split(),
        Schedule((0, 0, 1, 2), ((1, 2), (), (3,), (1, 2, 4))),
        [("held values stay", 0, "0 (split)", "p", "it is held until op 2 (use) has run, but it is freed before")],
    ),
    "handed values stay": (
        handed(),
        Schedule((0, 1, 2, 0, 3, 4), ((), (), (1,), (), (), (1, 2, 3))),
        [
            (
                "handed values stay",
                2,
                "2 (unpack)",
                "a",
                "op 4 (product_backward) still reads what the backward has been handed, but it is freed before",
            )
        ],
    ),
    "storage taken over": (
        in_place(),
        Schedule((0, 1, 2, 1, 3), ((), (2,), (), (1,), (2, 3, 4))),
        [
            (
                "storage taken over",
                2,
                "2 (relu_)",
                "a",
                "its storage is taken over by 'r' in this run, but it is not among the frees",
            )
        ],
    ),
    "calls run from the beginning": (
        linear(),
        Schedule((0, 1, 2, 3, 1, 4, 5), ((), (), (3, 4), (5,), (4,), (), (2, 3, 6))),
        [
            (
                "calls run from the beginning",
                4,
                "1 (cast)",
                "",
                "the op runs again without op 0 (cast) of the same call right before it",
            ),
        ],
    ),
    "calls hand out what is ready": (
        linear(),
        Schedule((0, 1, 2, 3, 0, 4, 5), ((), (), (2, 4), (5,), (), (), (2, 3, 6))),
        [
            ("calls hand out what is ready", 5, "4 (unpack)", "xh", NOT_READY),
            ("calls hand out what is ready", 6, "5 (mm_backward)", "xh", NOT_READY),
        ],
    ),
    "calls hold what they held": (
        linear(),
        Schedule((0, 1, 2, 3, 0, 1, 2, 4, 5), ((), (), (2, 3, 4), (5,), (), (4,), (5,), (), (2, 3, 6))),
        [
            (
                "calls hold what they held",
                6,
                "2 (mm)",
                "t",
                "it is freed after run 5, but the call goes on and held it in its first run",
            )
        ],
    ),
    "nothing left": (
        chain(),
        Schedule((0, 1, 2, 3, 4), ((), (), (), (3,), (1, 4, 5))),
        [("nothing left", -1, "", "b", "it is never freed, though nothing holds it to the end")],
    ),
}


@pytest.mark.parametrize(("program", "schedule", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_names_what_is_broken(program: Program, schedule: Schedule, expected: list[tuple[object, ...]]) -> None:
    assert list(verify(program, schedule)) == [Violation(*found) for found in expected]  # type: ignore[arg-type]


def test_budget_kept() -> None:
    assert verify(chain(), AGAIN, budget_bytes=87) == ()
    message = "87 bytes are in memory, 2 over the budget of 85 bytes; runs over it: 1"
    assert verify(chain(), AGAIN, budget_bytes=85) == (Violation("budget kept", 5, "4 (g1)", "", message),)
    (found,) = verify(chain(), AGAIN, budget_bytes=0)
    assert "runs over it: 6" in found.message


def test_budget_of_a_program_without_ops() -> None:
    program = Program("data", (Value("x", 3, fixed=True),), ())
    assert verify(program, Schedule((), ()), budget_bytes=3) == ()
    assert [v.rule for v in verify(program, Schedule((), ()), budget_bytes=2)] == ["budget kept"]


def test_a_plan_brings_its_budget_and_its_figures() -> None:
    assert verify(chain(), chain_plan()) == ()
    assert [v.rule for v in verify(chain(), chain_plan(budget_bytes=86))] == ["budget kept"]
    assert verify(chain(), chain_plan(budget_bytes=86), budget_bytes=87) == ()
    assert [v.rule for v in verify(chain(), chain_plan(), budget_bytes=86)] == ["budget kept"]


FIGURES = {
    "peak": ({"peak_bytes": 86}, "peak_bytes is 86, but the machine counted 87"),
    "plain peak": ({"plain_peak_bytes": 96}, "plain_peak_bytes is 96, but the machine counted 95"),
    "overhead": ({"overhead": 0.12, "lower_bound": 0.1}, "overhead is 0.12, but the machine counted 0.125"),
    "overhead no number": ({"overhead": float("nan")}, "overhead is nan, but the machine counted 0.125"),
    "bound": ({"lower_bound": 0.13}, "lower_bound is 0.13, but this very schedule has an overhead of 0.125"),
    "bound no number": ({"lower_bound": float("nan")}, "lower_bound is nan, but this very schedule has"),
    "floor": ({"floor_bytes": 91}, "floor_bytes is 91, but this plan is for 90 bytes"),
    "floor bound": (
        {"floor_lower_bound_bytes": 88},
        "floor_lower_bound_bytes is 88, but this very schedule has a peak of 87 bytes",
    ),
}


@pytest.mark.parametrize(("changes", "message"), FIGURES.values(), ids=FIGURES.keys())
def test_plans_figures(changes: dict[str, object], message: str) -> None:
    (found,) = verify(chain(), chain_plan(**changes))
    assert (found.rule, found.run, found.op, found.value) == ("plan's figures", -1, "", "")
    assert found.message.startswith(message)


def test_overhead_of_a_program_that_takes_no_time_is_zero() -> None:
    program = replace(chain(), ops=tuple(replace(op, seconds=0.0) for op in chain().ops))
    assert verify(program, chain_plan(program=program, overhead=0.0, lower_bound=0.0)) == ()


def test_plans_program() -> None:
    other = replace(chain(), name="other")
    assert verify(other, chain_plan()) == (
        Violation("plan's program", -1, "", "", "the plan is for program 'chain', which is not the one given"),
    )


def test_the_machine_counts_plain_programs_with_everything_in_them() -> None:
    for program in (chain(), in_place(), split(), held()):
        schedule, peak = Schedule.plain(program), simulate(program).peak_bytes
        assert verify(program, Plan(program, schedule, peak, peak, peak, peak, 0.0, 0.0, "keep everything")) == ()


def test_one_mistake_is_reported_where_it_happens_and_the_machine_goes_on() -> None:
    broken = Schedule((0, 7, 1, 2, 3, 4), ((0,), (), (1,), (), (2, 3), (1, 4)))
    assert [(v.rule, v.run, v.value) for v in verify(chain(), broken, budget_bytes=94)] == [
        ("fixed values stay", 0, "x"),
        ("ops exist", 1, ""),
        ("reads are resident", 5, "a"),
        ("nothing left", -1, "da"),
    ]


def test_the_list_of_violations_is_bounded() -> None:
    endless = Schedule((9,) * 1000, ((),) * 1000)
    assert len(verify(chain(), endless)) == MOST_VIOLATIONS


def test_every_rule_is_broken_by_a_test_and_reads_as_a_sentence() -> None:
    broken = {name.split(",")[0] for name in BROKEN}
    elsewhere = {"runs allowed", "reruns at asks", "reruns by decisions"}  # test_abilities.py
    elsewhere |= RULES_OF_OFFLOAD  # test_offload.py
    assert broken | elsewhere | {"budget kept", "plan's figures", "plan's program"} == set(RULES)
    assert all(sentence.startswith("is read as: ") for sentence in RULES.values())


def test_a_violation_is_one_readable_line() -> None:
    violation = Violation("reads are resident", 4, "4 (g1)", "a", "the op reads it")
    assert str(violation) == "[reads are resident] run 4, op 4 (g1), value 'a': the op reads it"
    assert str(Violation("plan's figures", -1, "", "", "peak_bytes is 1")) == "[plan's figures] peak_bytes is 1"
    assert str(Violation("every op runs", -1, "4 (g1)", "", "never")) == "[every op runs] op 4 (g1): never"


def test_the_judge_shares_no_code_with_the_accused() -> None:
    """It may look at the fields of values, ops, schedules and plans, at nothing that is computed from them."""
    paths = (Path(_verify_function.__code__.co_filename), Path(Tier.at.__code__.co_filename))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {module for module in imported if module and module.startswith("autoremat")}
    itself = "autoremat.program.tier_judge"
    assert ours == {itself, "autoremat.program.model", "autoremat.program.plan", "autoremat.program.schedule"}
    computed = {"readers", "producer", "hold", "fixed_bytes", "runs_of", "extra_seconds", "from_order", "moves"}
    computed |= {"actions", "out_seconds", "in_seconds", "has_calls"}
    assert computed.isdisjoint(node.attr for node in nodes if isinstance(node, ast.Attribute))


# --- Properties -------------------------------------------------------------------------------------------------------


def planned(program: Program, schedule: Schedule) -> Plan:
    """A plan whose figures are those of ``simulate``."""
    timeline, plain = simulate(program, schedule), simulate(program).peak_bytes
    overhead = timeline.extra_seconds / program.seconds if program.seconds else 0.0
    peak = timeline.peak_bytes
    return Plan(program, schedule, peak, peak, plain, min(peak, plain), overhead, 0.0, "random")


def anywhere(program: Program) -> Program:
    """The same, recorded by an engine that can run ops again anywhere."""
    return replace(program, abilities=Abilities())


@given(st.data())
def test_judge_and_simulator_agree(data: st.DataObject) -> None:
    program = anywhere(data.draw(programs()))
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    plan = planned(program, schedule)
    assert verify(program, schedule) == ()
    assert verify(program, plan) == ()
    over = verify(program, schedule, budget_bytes=plan.peak_bytes - 1)
    assert [v.rule for v in over] == ["budget kept"]
    assert over[0].run == simulate(program, schedule).peak_run


@given(st.data())
def test_whoever_frees_later_is_counted_the_same(data: st.DataObject) -> None:
    """Schedules that free at any time, as solvers of their own make them: judge and simulator count the same peak."""
    program = anywhere(data.draw(programs()))
    schedule = Schedule.from_order(program, data.draw(orders(program)))
    frees = [list(f) for f in schedule.frees]
    for p, leaving in enumerate(schedule.frees):
        for v in leaving:
            to = data.draw(st.integers(p, len(frees) - 1))
            if not any(v in frees[q] or v in program.ops[schedule.order[q]].writes for q in range(p + 1, to + 1)):
                frees[p].remove(v)
                frees[to].append(v)
    lazy = Schedule(schedule.order, tuple(tuple(f) for f in frees))
    assert {v.rule for v in verify(program, lazy)} <= {"storage taken over"}
    assert {v.rule for v in verify(program, planned(program, lazy))} <= {"storage taken over"}


@given(st.data())
def test_what_the_simulator_refuses_the_judge_names(data: st.DataObject) -> None:
    program = replace(data.draw(programs(max_ops=3)), abilities=data.draw(abilities()))
    ops, values = st.integers(-1, len(program.ops)), st.integers(-1, len(program.values))
    order = data.draw(st.lists(ops, max_size=8))
    frees = data.draw(st.lists(st.lists(values, max_size=2), min_size=len(order), max_size=len(order)))
    schedule = Schedule(tuple(order), tuple(tuple(f) for f in frees))
    rules = {v.rule for v in verify(program, schedule)}
    try:
        simulate(program, schedule)
    except InvalidSchedule:
        assert rules & {"ops exist", "reads are resident", "frees are of resident values", "fixed values stay"}
    else:
        assert not rules & {"ops exist", "reads are resident", "frees are of resident values"}


@pytest.mark.parametrize("stranger", [-1, 5])
@pytest.mark.parametrize("reruns", ["anywhere", "at asks", "by decisions"])
def test_a_run_of_no_op_is_named_whatever_the_engine_can_do(reruns: Reruns, stranger: int) -> None:
    program = replace(chain(), abilities=Abilities(reruns=reruns, most_runs=2))
    order = (0, 1, 0, stranger, 2, 0, stranger, 3)
    named = [v.run for v in verify(program, Schedule(order, ((),) * len(order))) if v.rule == "ops exist"]
    assert named == [p for p, op in enumerate(order) if not 0 <= op < len(program.ops)]


@given(st.data())
def test_a_schedule_with_one_free_left_out_is_not_accepted(data: st.DataObject) -> None:
    program = data.draw(programs())
    schedule = Schedule.plain(program)
    p = data.draw(st.sampled_from([p for p, f in enumerate(schedule.frees) if f]))
    v = data.draw(st.sampled_from(schedule.frees[p]))
    frees = tuple(tuple(w for w in f if (q, w) != (p, v)) for q, f in enumerate(schedule.frees))
    found = verify(program, Schedule(schedule.order, frees))
    to_the_end = program.values[v].held in (END, len(program.ops) - 1)
    assert [x.value for x in found if x.rule == "nothing left"] == ([] if to_the_end else [program.values[v].id])
