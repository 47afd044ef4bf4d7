"""Random small programs are trained as plain torch trains them, to the last bit, and within their budgets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from autoremat.engines.torch.eager.check import SelfCheck
from tests.engines.torch.compare import off_by_a_bit
from tests.engines.torch.eager.fuzz import scripts as words
from tests.engines.torch.eager.fuzz.draw import features, measured_scripts, moved_scripts, scripts
from tests.engines.torch.eager.fuzz.examine import Outcome, examine
from tests.engines.torch.eager.fuzz.model import RETURNS
from tests.engines.torch.eager.fuzz.operations import GROUPS
from tests.engines.torch.eager.fuzz.scripts import Do, Script, Step, Way
from tests.engines.torch.eager.fuzz.search import look_at, smallest_failure
from tests.engines.torch.eager.fuzz.uses import USES
from tests.fixed import random_seed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counts(found: list[tuple[Script, Outcome]]) -> Counter[str]:
    """How many had what."""
    seen: Counter[str] = Counter()
    for script, outcome in found:
        seen += features(script)
        seen["all"] += 1
        seen["an error of torch's"] += bool(outcome.error)
        seen["run again"] += outcome.reruns > 0
        seen["left the path"] += outcome.deviations > 0
    return seen


@pytest.mark.one_in(8, guard=True)
@pytest.mark.parametrize("number", range(8))
def test_random_programs_are_exact(number: int) -> None:
    found = look_at(scripts, 25, number)
    assert not smallest_failure(found), smallest_failure(found)
    assert counts(found)["run again"] > len(found) / 4


@pytest.mark.parametrize("n", [2, pytest.param(8, marks=(pytest.mark.slow, pytest.mark.guard))])
def test_random_programs_stay_within_their_budgets(n: int) -> None:
    found = look_at(measured_scripts, n, 0)
    assert not smallest_failure(found), smallest_failure(found)
    assert all(outcome.peak or outcome.error for _, outcome in found)


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("number", range(100, 104))
def test_some_more_random_programs(number: int) -> None:
    found = look_at(scripts, 50, number)
    assert not smallest_failure(found), smallest_failure(found)


@pytest.mark.one_in(8, guard=True)
@pytest.mark.parametrize("number", range(8))
def test_random_programs_whose_values_move_are_exact(number: int) -> None:
    found = look_at(moved_scripts, 15, 500 + number)
    assert not smallest_failure(found), smallest_failure(found)
    assert sum(outcome.moved > 0 for _, outcome in found) > len(found) / 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_random_programs_whose_values_move() -> None:
    """Other ones each time ``make test-all`` runs."""
    found = [each for number in range(500, 510) for each in look_at(moved_scripts, 100, random_seed(number))]
    assert not smallest_failure(found), smallest_failure(found)
    assert sum(outcome.moved > 0 for _, outcome in found) > len(found) / 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_random_programs() -> None:
    """Other ones each time ``make test-all`` runs."""
    found = [each for number in range(100, 115) for each in look_at(scripts, 100, random_seed(number))]
    found += look_at(measured_scripts, 50, random_seed(100))
    assert not smallest_failure(found), smallest_failure(found)
    seen = counts(found)
    wanted = [*(f"op: {g}" for g in GROUPS), *(f"use: {u}" for u in USES), *(f"returns: {r}" for r in RETURNS)]
    assert all(seen[name] >= 10 for name in [*wanted, "branch on data", "left the path"]), seen
    assert seen["run again"] > seen["all"] / 2
    assert seen["an error of torch's"] < seen["all"] / 2, "most programs are valid"


def test_a_script_is_text_that_makes_it_again() -> None:
    for script, _ in look_at(scripts, 3, 1):
        assert eval(repr(script), vars(words)) == script


def test_a_wrong_number_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script((Do("sigmoid", 0, 2),), steps=(Step(), Step()), way=Way("nothing"))
    assert examine(script).wrong == []
    off_by_a_bit(monkeypatch, when=lambda entry: torch._C._current_graph_task_id() >= 0)  # in the backward
    monkeypatch.setattr(SelfCheck, "remade", lambda *args: None)
    assert any("gradient" in name for name in examine(script).wrong)
