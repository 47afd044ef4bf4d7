"""``frontier``: monotone, never worse than ``solve``, within every budget; its words and its picture."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from matplotlib.image import imread

import autoremat
from autoremat.planner import Wishes, clock, frontier, solve
from autoremat.planner.frontiers import reached
from autoremat.planner.search.jobs import Jobs
from autoremat.planner.search.pool import Pool
from autoremat.program import InfeasibleBudget, Link, Plan, Program, simulate, verify
from autoremat.program.units import format_bytes
from autoremat.show.plots import frontier_plot
from tests.fixed import examples
from tests.planner.chains import chain, gpt, uniform_steps
from tests.planner.random_programs import steps


def assert_lawful(program: Program, points: tuple[Plan, ...]) -> None:
    for less, more in pairwise(points):
        assert less.budget_bytes < more.budget_bytes
        assert less.overhead >= more.overhead
        assert less.lower_bound >= more.lower_bound
    for p in points:
        assert p.program is program
        assert verify(program, p) == ()
        assert simulate(program, p).peak_bytes == p.peak_bytes <= p.budget_bytes
        assert p.lower_bound <= p.overhead + 1e-12


@pytest.mark.slow
@examples(15)
@given(program=steps())
def test_more_budget_never_costs_more(program: Program):
    found = frontier(program, points=6)
    assert_lawful(program, found.points)
    assert found.plan_at(found.floor_bytes).peak_bytes <= found.floor_bytes <= found.points[0].budget_bytes
    assert found.points[-1].budget_bytes == found.plain_peak_bytes == simulate(program).peak_bytes
    assert found.points[-1].overhead == 0


@pytest.mark.slow
def test_never_worse_than_solve_at_the_same_budget():
    program = gpt(2, vocabulary=256)
    found = frontier(program, points=4, time_limit_seconds=120)
    assert_lawful(program, found.points)
    for p in found.points:
        alone = solve(program, p.budget_bytes, time_limit_seconds=5)  # a sixth of what each point has
        assert p.overhead <= alone.overhead
        assert p.lower_bound >= alone.lower_bound - 1e-3  # more time, other moments looked at


@pytest.mark.slow
def test_the_same_program_has_the_same_frontier():
    first, second = (frontier(chain(12), points=5, time_limit_seconds=600) for _ in range(2))
    assert first == second


def test_budgets_can_be_named_and_are_sorted():
    program = chain(12)
    plain = simulate(program).peak_bytes
    found = frontier(program, points=[0.75, "50%", plain, 1.0], time_limit_seconds=3)
    assert [p.budget_bytes for p in found.points] == [plain // 2, plain * 3 // 4, plain]


def test_a_budget_below_the_floor_is_an_error():
    with pytest.raises(InfeasibleBudget, match="floor"):
        frontier(chain(12), points=[1, 1.0])


@pytest.mark.parametrize("points", [1, 0, -3, True, [], (), "50%", 0.5])
def test_what_is_no_number_of_points_and_no_list_of_budgets(points: Any):
    with pytest.raises(ValueError, match="points is at least 2"):
        frontier(chain(4), points=points)


def test_a_program_without_a_choice_has_one_point():
    found = frontier(chain(1), points=5)
    assert [p.overhead for p in found.points] == [0.0]
    assert "Frontier of chain1" in str(found)


def test_plan_at_takes_the_cheapest_that_fits_and_a_bound_that_holds():
    program = chain(16)
    found = frontier(program, points=4, time_limit_seconds=3)
    for below, above in pairwise(found.points):
        plan = found.plan_at((below.budget_bytes + above.budget_bytes) // 2)
        assert plan.overhead in (below.overhead, above.overhead)
        assert plan.peak_bytes <= plan.budget_bytes
        assert plan.lower_bound == above.lower_bound
    assert found.plan_at(2 * found.plain_peak_bytes).overhead == 0
    assert found.plan_at(2 * found.plain_peak_bytes).lower_bound == 0
    assert found.plan_at("100%") == found.points[-1]
    with pytest.raises(InfeasibleBudget) as caught:
        found.plan_at(found.floor_bytes - 1)
    assert caught.value.floor_bytes == found.floor_bytes


def test_a_plan_with_room_below_is_used_for_smaller_budgets_too():
    found = frontier(chain(12), points=4)
    low, high = found.points[0], found.points[-2]
    roomy = replace(found, points=(low, replace(high, peak_bytes=low.peak_bytes)))
    assert roomy.plan_at(low.budget_bytes).overhead == high.overhead


@pytest.mark.slow
def test_constraints_hold_along_the_frontier():
    program = gpt(2, vocabulary=256)
    found = frontier(program, points=3, wishes=Wishes(keep="gelu", recompute="fc1"))
    assert_lawful(program, found.points)
    for p in found.points:
        ran = {program.ops[i].name for i, n in p.schedule.runs_of.items() if n > 1}
        assert "gelu" not in ran
        assert "fc1" in ran
    with pytest.raises(InfeasibleBudget, match="under the constraints"):
        frontier(program, points=[frontier(program, points=2).floor_bytes, 1.0], wishes=Wishes(keep="blocks"))


def test_progress_rises_and_ends_at_one():
    seen: list[tuple[str, float]] = []
    frontier(chain(12), points=4, progress=lambda what, share: seen.append((what, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert any(what.startswith("budget 4 of 4, ") for what, _ in seen)


def test_the_words():
    text = str(frontier(gpt(4, vocabulary=256), points=[0.4, 0.7, 1.0], time_limit_seconds=3))
    lines = text.splitlines()
    assert lines[0].startswith("Frontier of gpt4: floor ")
    assert "plain peak" in lines[0]
    assert [line.split()[2] for line in lines[-3:]] == ["40.0%", "70.0%", "100.0%"]
    bars = [line.count("█") + line.count("░") for line in lines[-3:]]
    assert bars[0] == 36 > bars[1] > bars[2] == 0
    assert max(map(len, lines)) <= 110
    assert "…" not in text


def test_with_a_link_it_says_what_goes_to_the_tier():
    program = replace(uniform_steps(12), link=Link(400.0, 400.0))
    found = frontier(program, points=4, time_limit_seconds=1)
    alone = frontier(replace(program, link=None), points=4, time_limit_seconds=1)
    assert found.floor_bytes <= alone.floor_bytes
    assert solve(program, found.floor_bytes, effort=0.01).peak_bytes <= found.floor_bytes
    sent = [simulate(p.program, p).sent_bytes for p in found.points]
    assert max(sent) > 0 == sent[-1]
    points = json.loads(found.to_json())["points"]
    assert [p["sent_bytes"] for p in points] == sent
    assert all(p["tier_bytes"] <= p["sent_bytes"] and p["waited_seconds"] >= 0 for p in points)
    assert "sent_bytes" not in json.loads(alone.to_json())["points"][0]
    lines = str(found).splitlines()
    assert "to the tier   most in it   waiting" in lines[1]
    assert all(format_bytes(n) in line for n, line in zip(sent, lines[-4:], strict=True))
    assert "to the tier" not in str(alone)


@pytest.mark.slow
def test_other_solvers_beside_it():
    found = frontier(gpt(4, vocabulary=256), points=[0.5, 1.0])
    (plain,) = reached(found, "keep-everything")
    assert (plain.overhead, plain.budget_bytes) == (0, found.plain_peak_bytes)


def test_the_picture(tmp_path: Path):
    found = frontier(chain(12), points=4)
    figure = found.plot(tmp_path / "new" / "frontier.png", beside=("segments",))
    assert imread(tmp_path / "new" / "frontier.png").std() > 0
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert lines["autoremat"].get_xdata() == pytest.approx([p.peak_bytes / 1e6 for p in found.points])
    assert lines["autoremat"].get_ydata() == pytest.approx([100 * p.overhead for p in found.points])
    assert lines.keys() == {"autoremat", "segments", "floor 400 B", "plain peak 1.3 KB"}
    assert frontier_plot(found).axes


def test_a_callable_is_recorded():
    model = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(4)])
    found = autoremat.frontier(model, torch.randn(64, 16), points=3, optimizer=torch.optim.Adam(model.parameters()))
    assert_lawful(found.program, found.points)
    without = autoremat.frontier(model, torch.randn(64, 16), points=2)
    assert found.plain_peak_bytes > without.plain_peak_bytes


def test_a_program_takes_no_arguments():
    assert autoremat.frontier(chain(4), points=2).points
    with pytest.raises(TypeError, match="a program stands for itself"):
        autoremat.frontier(chain(4), torch.ones(1), points=2)


@pytest.mark.slow
@pytest.mark.guard
def test_the_first_budget_does_not_take_the_time_of_all(monkeypatch: pytest.MonkeyPatch):
    """Where its search takes longer than it should, the others still have candidates to start from."""
    now, jobs = [0.0], [0]
    run, improve = Jobs._run, Pool._improve

    def run_in_a_second(self: Jobs, job: Any, deadline: float) -> None:
        jobs[0] += job not in self._found
        now[0] += job not in self._found
        run(self, job, deadline)

    def take_all_time(self: Pool, *args: Any, **more: Any) -> None:
        improve(self, *args, **more)
        now[0] += 1000

    monkeypatch.setattr(clock, "now", lambda: now[0])
    monkeypatch.setattr(Jobs, "_run", run_in_a_second)
    monkeypatch.setattr(Pool, "_improve", take_all_time)
    program = gpt(2, vocabulary=256)
    pool = Pool(program)
    enough = len(list(pool._rest_of_the_work())) + 12
    frontier(program, points=12, time_limit_seconds=10 * enough)
    assert jobs[0] >= 1.9 * enough
