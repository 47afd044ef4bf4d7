"""What every engine promises, tried on a step of each: the numbers of the plain step, within the budget."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autoremat.engines.engine import NAMES, engine_of
from autoremat.planner import solve
from autoremat.program import simulate, verify
from tests.engines.cases import CASES, FRAMEWORKS, Case

SHARES = 1.0, 0.8, 0.6


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """An engine whose framework is installed."""
    if request.param in FRAMEWORKS:
        pytest.importorskip(FRAMEWORKS[request.param])
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]()


def test_it_has_the_name_that_it_is_found_by(name: str) -> None:
    assert engine_of(name).name == name


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'abacus'; choose one of .*numpy"):
        engine_of("abacus")


def test_its_programs_have_its_abilities_and_names_that_tell_values_apart(name: str, case: Case) -> None:
    engine = engine_of(name)
    program = engine.record(case.step)
    assert program.abilities == engine.abilities
    assert len({v.id for v in program.values}) == len(program.values)
    assert {op.phase for op in program.ops} >= {"forward", "backward"}


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("share", SHARES)
def test_a_plan_gives_the_numbers_of_the_plain_step_within_its_budget(name: str, case: Case, share: float) -> None:
    engine = engine_of(name)
    program = engine.record(case.step)
    plan = solve(program, share, time_limit_seconds=1.0)
    assert verify(program, plan) == ()
    run = engine.carry_out(case.step, plan)
    expected = case.plain()
    for _ in range(2):
        assert case.agree(case.under(run), expected)
    measured = case.measured(run)
    if engine.abilities.ordered:
        assert measured <= simulate(program, plan.schedule).peak_bytes <= plan.budget_bytes
    if share < 1:
        everything = engine.carry_out(case.step, solve(program, 1.0, time_limit_seconds=1.0))
        assert measured < case.measured(everything)
        assert any(n > 1 for n in plan.schedule.runs_of.values())


def test_a_plan_of_another_step_is_refused_in_words(name: str, case: Case) -> None:
    engine = engine_of(name)
    plan = solve(engine.record(case.step), 0.8, time_limit_seconds=1.0)
    with pytest.warns(Warning, match="plan") if name == "torch.eager" else pytest.raises(ValueError, match="plan"):
        engine.carry_out(case.other, plan)()


@pytest.mark.slow
@pytest.mark.guard
def test_it_imports_its_own_framework_alone(name: str) -> None:
    others = sorted({f for n, f in FRAMEWORKS.items() if n != name} - {FRAMEWORKS.get(name)})
    code = (
        "import sys\nfrom autoremat.engines.engine import engine_of\n"
        f"engine_of({name!r})\nassert not [m for m in {others!r} if m in sys.modules], sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_engine_is_tried() -> None:
    assert set(CASES) == set(NAMES)
