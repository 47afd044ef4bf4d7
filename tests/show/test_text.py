from __future__ import annotations

from dataclasses import replace

import pytest

from autoremat.planner import solve
from autoremat.program import Op, Program, Schedule, Value
from autoremat.show.text import fold_indices, format_seconds, plan_text
from tests.planner.chains import gpt
from tests.program.hand import LINK, away, chain_plan

GOLDEN = """\
Plan for chain by solver by hand
  budget           90 B  94.7% of the plain peak
  peak             87 B  91.6% of the plain peak
  reserved       2.1 MB  of a device, by a caching allocator such as CUDA's
  plain peak       95 B  with nothing computed again
  floor            87 B  smallest known peak; no plan can be below 87 B
  extra time     +12.5%  no plan within this budget can be below +12.5%
  plain step     8.00 s  given
Computed again: 1 of 5 ops, 1 further runs, 1.00 s
     1.00 s     1 runs  f0
The peak stands at op 4, g1 (backward); 7 B of scratch
In memory there:
       30 B    1 x  db
       20 B    1 x  a
       20 B    1 x  da
       10 B    1 x  x
Other schedules that were looked at:
  keep everything    +0.0%  peak      95 B  above the budget"""


def test_a_plan_in_words() -> None:
    assert plan_text(chain_plan()) == str(chain_plan()) == GOLDEN


def test_a_plan_without_further_runs_says_so() -> None:
    plan = chain_plan()
    text = plan_text(replace(plan, schedule=Schedule.plain(plan.program), candidates=()))
    assert "Nothing is computed again." in text
    assert "87 B  smallest known peak; no plan can be below 87 B\n" in text
    assert "87 B  smallest known peak\n" in plan_text(replace(plan, floor_lower_bound_bytes=0))
    assert "Other schedules" not in text


def test_estimates_are_called_so_and_no_folder_of_this_machine_is_shown() -> None:
    plan, ops = chain_plan(), list(chain_plan().program.ops)
    ops[4] = replace(ops[4], module="blocks.1.mlp", source="/home/me/project/net/model.py:56")
    lines = plan_text(replace(plan, program=replace(plan.program, ops=tuple(ops), timing="estimated"))).splitlines()
    assert "  plain step     8.00 s  estimated, and memory inside kernels not counted" in lines
    assert "  of blocks.1.mlp, net/model.py:56" in lines
    assert max(map(len, lines)) <= 80


def test_equal_layers_are_folded_and_added_up() -> None:
    layers = 4
    values = [Value("x", 1, fixed=True)]
    values += [Value(f"a{i}", 10, label=f"blocks.{i}.mlp.0 float32[10]") for i in range(layers)]
    values += [Value(f"n{i}", 5, label=f"norm{i}") for i in range(layers)]
    ops = [Op("aten.gelu.default", (0,), (1 + i,), 0.5, module=f"blocks.{i}.mlp.0") for i in range(layers)]
    ops += [Op("aten.relu.default", (0,), (1 + layers + i,), 0.1, module=f"norm{i}") for i in range(layers)]
    ops += [Op("loss", tuple(range(1, 1 + 2 * layers)), ())]
    program = Program("layers", tuple(values), tuple(ops))
    order = [0, 1, 2, 4, 5, 6, 7, 0, 1, 2, 3, 4, 8]
    plan = replace(chain_plan(), program=program, schedule=Schedule.from_order(program, [3, *order]))
    lines = [" ".join(line.split()) for line in plan_text(plan).splitlines()]
    assert "2.00 s 4 runs blocks.0-3.mlp.0 gelu" in lines
    assert "100 ms 1 runs norm0 relu" in lines or "100.0 ms 1 runs norm0 relu" in lines
    assert "40 B 4 x blocks.0-3.mlp.0 float32[10]" in lines


def test_more_than_six_lines_are_summed_up() -> None:
    values = (*(Value(f"x{'abcdefgh'[i]}", 100 + i, fixed=True) for i in range(8)), Value("y", 1))
    program = Program("wide", values, (Op("f", tuple(range(8)), (8,)),))
    plan = replace(chain_plan(), program=program, schedule=Schedule.plain(program))
    assert "      202 B  in 3 more" in plan_text(plan)


def test_an_empty_program_has_words_too() -> None:
    program = Program("", (), ())
    plan = replace(chain_plan(), program=program, schedule=Schedule.plain(program), plain_peak_bytes=0)
    assert plan_text(plan).startswith("Plan by solver by hand\n")


@pytest.mark.parametrize(
    ("indices", "text"),
    [([], ""), ([4], "4"), ([0, 1, 2], "0-2"), ([3, 0, 1, 7, 1], "0-1,3,7"), ([9, 10, 11, 2], "2,9-11")],
)
def test_fold_indices(indices: list[int], text: str) -> None:
    assert fold_indices(indices) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (3.5e-5, "35 us"), (0.00099951, "1.0 ms"), (0.0121, "12.1 ms"), (0.9996, "1.00 s"), (75, "75.00 s")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_peak_that_is_an_estimate_says_so() -> None:
    program = gpt(1)
    free = replace(program, abilities=replace(program.abilities, ordered=False))
    assert "(estimate: the engine orders runs)" in str(solve(free, 1.0))
    assert "estimate: the engine" not in str(solve(program, 1.0))


def test_a_plan_says_what_goes_to_the_tier() -> None:
    program, schedule = away()
    program = replace(program, link=replace(LINK, name="disk:/scratch"))
    text = plan_text(replace(chain_plan(), program=program, schedule=schedule, overhead=2.5 / 8))
    assert "to the tier      20 B  disk:/scratch: 1 moves, at most 20 B at a time; 2.50 s of waiting" in text
    assert "to the tier" not in plan_text(chain_plan())
