"""Values that stay in a slower tier for a while: bytes, seconds, rules, files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoremat.program import (
    Fetch,
    Free,
    Gone,
    Here,
    InvalidProgram,
    InvalidSchedule,
    Link,
    Offload,
    Plan,
    Program,
    Run,
    Schedule,
    Send,
    simulate,
    verify,
)
from tests.program.hand import LINK, RULES_OF_OFFLOAD, away, chain, handed, in_place, linear, split


def test_bytes_are_those_of_the_order_alone() -> None:
    program, schedule = away()
    assert simulate(program).resident_bytes == (30, 60, 65, 95, 87)
    assert simulate(program, schedule).resident_bytes == (30, 60, 65, 75, 87)
    slow = replace(program, link=Link(1e-9, 1e-9))
    assert simulate(slow, schedule).resident_bytes == (30, 60, 65, 75, 87)


def test_seconds_are_those_of_two_clocks() -> None:
    program, schedule = away()
    timeline = simulate(program, schedule)
    assert timeline.waited_seconds == 2.5  # out 1.5 s beside f2, which takes 3; in 2.5 s, and nothing beside
    assert timeline.seconds == program.seconds + 2.5
    assert (timeline.tier_bytes, timeline.sent_bytes) == (20, 20)
    early = replace(schedule, offloads=(Offload(1, 1, 1, 3, 4),))
    assert simulate(program, early).waited_seconds == 1.5 + 1.5  # nothing beside the copy out; g2 beside the one in
    assert simulate(program, early).resident_bytes == (30, 60, 45, 95, 87)


def test_a_link_that_takes_turns_makes_copies_wait_for_each_other() -> None:
    program, schedule = away()
    schedule = replace(schedule, offloads=(Offload(1, 1, 2, 4, 4), Offload(2, 1, 1, 2, 2)))
    both = simulate(program, schedule)
    turns = simulate(replace(program, link=replace(LINK, takes_turns=True)), schedule)
    assert both.waited_seconds == 3.5 + 3.5 + 2.5  # a out 1.5, b out 2.0 behind it; b in 3.5; a in 2.5
    assert turns.waited_seconds == 3.5 + 3.5 + 2.5
    assert both.peak_bytes == turns.peak_bytes


def test_what_is_resident_at_the_peak_does_not_list_what_is_away() -> None:
    program, schedule = away()
    program = replace(program, ops=(*program.ops[:3], replace(program.ops[3], scratch_bytes=20), program.ops[4]))
    assert simulate(program, schedule).peak_op == 3
    assert simulate(program, schedule).resident_at_peak == (2, 4, 0, 3)
    assert simulate(program, replace(schedule, offloads=())).resident_at_peak == (2, 4, 1, 0, 3)


def test_what_is_read_while_it_is_away_is_named() -> None:
    program, schedule = away()
    with pytest.raises(InvalidSchedule, match=r"op 1 .* reads 'a', which is not resident"):
        simulate(program, replace(schedule, offloads=(Offload(1, 0, 0, 4, 4),)))


def test_actions_are_the_same_as_one_list() -> None:
    _, schedule = away()
    assert schedule.actions == (
        Run(0), Run(1), Send(1), Run(2), Gone(1), Run(3), Free(2), Free(3), Fetch(1), Here(1), Run(4),
        Free(1), Free(4), Free(5),
    )  # fmt: skip
    assert Schedule.of_actions(schedule.actions) == schedule


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ([Send(1), Run(0)], "value 1 is sent before anything has run"),
        ([Run(0), Gone(1)], "does not follow"),
        ([Run(0), Send(1), Fetch(1)], "does not follow"),
        ([Run(0), Send(1), Gone(1), Fetch(1)], "never waited for"),
    ],
)
def test_events_that_do_not_make_an_offload_are_refused(actions: list[object], says: str) -> None:
    with pytest.raises(InvalidSchedule, match=says):
        Schedule.of_actions(actions)  # type: ignore[arg-type]


def test_a_program_without_a_link_cannot_be_offloaded() -> None:
    program, schedule = away()
    with pytest.raises(InvalidSchedule, match="has no link"):
        simulate(replace(program, link=None), schedule)


@pytest.mark.parametrize(
    "fields",
    [{"out_bytes_per_second": 0.0}, {"in_bytes_per_second": -1.0}, {"latency_seconds": -1}, {"tier_bytes": -1}],
)
def test_links_that_cannot_be_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidProgram, match=next(iter(fields))):
        replace(LINK, **fields)  # type: ignore[arg-type]


# ---- the judge -----------------------------------------------------------------------------------------------------


def test_what_can_be_carried_out_is_accepted() -> None:
    program, schedule = away()
    assert verify(program, schedule, budget_bytes=87) == ()
    assert [v.rule for v in verify(program, schedule, budget_bytes=86)] == ["budget kept"]
    twice = replace(schedule, offloads=(Offload(1, 1, 1, 3, 3), Offload(1, 3, 3, 4, 4)))
    assert verify(program, twice) == ()


def moved(*offloads: Offload, program: Program | None = None) -> tuple[Program, Schedule]:
    program = replace(chain() if program is None else program, link=LINK)
    return program, replace(Schedule.plain(program), offloads=offloads)


BROKEN = {
    "sent whole": moved(Offload(2, 0, 2, 3, 3)),  # b has not been made yet
    "sent whole, fixed": moved(Offload(0, 1, 2, 3, 3)),
    "sent whole, on its way already": moved(Offload(1, 1, 3, 4, 4), Offload(1, 2, 3, 4, 4)),
    "sources stay, freed too early": (moved()[0], Schedule(
        (0, 1, 2, 3, 4), ((), (), (1,), (2, 3), (1, 4, 5)), (Offload(1, 1, 3, 4, 4),))),
    "sources stay, overwritten": moved(Offload(1, 1, 2, 3, 3), program=in_place()),
    "sources stay, taken over": moved(Offload(1, 2, 2, 3, 3), program=in_place()),
    "sources stay, made once more": (moved()[0], Schedule(
        (0, 1, 2, 3, 0, 4), ((), (), (), (2, 3), (), (1, 4, 5)), (Offload(1, 1, 4, 5, 5),))),
    "gone when nobody needs it, held": moved(Offload(1, 0, 0, 2, 2), program=split()),
    "gone when nobody needs it, handed": moved(Offload(1, 2, 2, 4, 4), program=handed()),
    "away until fetched": (moved()[0], Schedule(
        (0, 1, 2, 3, 0, 4), ((), (), (), (2, 3), (), (1, 4, 5)), (Offload(1, 1, 2, 5, 5),))),
    "reads are resident": moved(Offload(1, 0, 0, 2, 2)),  # f1 reads a while it is away
    "read once it is here": moved(Offload(1, 1, 1, 3, 4), program=replace(chain(), ops=(
        *chain().ops[:3], replace(chain().ops[3], reads=(1, 2, 3)), chain().ops[4]))),
    "read once it is here, freed": (moved()[0], Schedule(
        (0, 1, 2, 3, 4), ((), (), (), (1, 2, 3), (4, 5)), (Offload(1, 1, 1, 3, 4),))),
    "moves between calls": moved(Offload(2, 0, 0, 4, 4), program=linear()),
    "moves between calls, not at an ask": moved(Offload(2, 2, 2, 5, 5), program=linear()),
    "offloads in order": moved(Offload(1, 2, 1, 4, 4)),
    "offloads in order, fetched before it is gone": moved(Offload(1, 1, 3, 3, 4)),
    "offloads in order, never here": moved(Offload(1, 1, 2, 4, 5)),
    "a link to the tier": (chain(), away()[1]),
    "a link to the tier, which the engine cannot use": (
        replace(away()[0], abilities=replace(chain().abilities, reruns="by decisions")), away()[1]),
    "tier kept": (replace(away()[0], link=replace(LINK, tier_bytes=19)), away()[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_every_mistake_is_named(name: str) -> None:
    program, schedule = BROKEN[name]
    assert name.split(",")[0] in {v.rule for v in verify(program, schedule)}


def test_every_rule_of_offload_is_broken() -> None:
    assert {name.split(",")[0] for name in BROKEN} - {"reads are resident"} == RULES_OF_OFFLOAD


def plan(**changes: object) -> Plan:
    program, schedule = away()
    said = {"program": program, "schedule": schedule, "budget_bytes": 90, "peak_bytes": 87, "plain_peak_bytes": 95,
            "floor_bytes": 87, "overhead": 2.5 / 8, "lower_bound": 0.0, "solver": "by hand"}  # fmt: skip
    return Plan(**(said | changes))  # type: ignore[arg-type]


def test_a_plan_promises_what_is_waited_for() -> None:
    assert verify(plan().program, plan()) == ()
    assert [v.rule for v in verify(plan().program, plan(overhead=0.0))] == ["plan's figures"]


# ---- files ---------------------------------------------------------------------------------------------------------


def test_plans_and_programs_with_a_link_are_files() -> None:
    assert Plan.from_json(plan().to_json()) == plan()
    limited = replace(plan().program, link=replace(LINK, tier_bytes=7, name="disk:/scratch"))
    assert Program.from_json(limited.to_json()) == limited


def test_without_a_link_files_say_nothing_of_one() -> None:
    text = replace(plan(), program=chain(), schedule=Schedule.plain(chain())).to_json()
    assert "link" not in text
    assert "offload" not in text


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('["a", 1, 2, 4, 4]', '["a", 1, 2, 4]', r"offload 0: must be \[value, send, gone, fetch, here\]"),
        ('["a", 1, 2, 4, 4]', '["z", 1, 2, 4, 4]', "names value 'z'"),
        ('["a", 1, 2, 4, 4]', '["a", 1, 2, 4, 5]', "'here' must be a run below 5, got 5"),
        ('"takes_turns": false', '"takes_turns": 1', "'takes_turns' must be true or false"),
        ('"in_bytes_per_second": 10.0', '"in_bytes_per_second": 0', "must be positive"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(old: str, new: str, says: str) -> None:
    text = plan().to_json()
    assert old in text
    with pytest.raises(InvalidProgram, match=says):
        Plan.from_json(text.replace(old, new))
