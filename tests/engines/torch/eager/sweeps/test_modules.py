"""Every module that torch knows, with everything computed again that may be, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.common_modules import ModuleInfo

from autoremat.engines.torch.eager.check import SelfCheck
from tests.engines.torch.compare import off_by_a_bit
from tests.engines.torch.eager.sweeps.module_sweep import DTYPES, MODULES, beside, cases, sweep, wrong_at
from tests.engines.torch.eager.sweeps.sweep import PLACES, Outcome, quiet
from tests.engines.torch.torch_checkpoint import FORMS

GUARDS = {torch.bfloat16: pytest.mark.guard}
"""The dtype of which continuous integration looks at all modules."""

NAMED = {info.name: info for info in MODULES}
EVERY_DAY = [
    name
    for name in NAMED
    if any(w in name for w in ("BatchNorm", "Norm2d", "LSTM", "Cell", "Attention", "EncoderLayer", "MaxPool2d"))
]
"""Running statistics, recurrence, attention, indices."""


def assert_exact(outcomes: list[Outcome]) -> None:
    """Nothing is wrong, nothing is refused by plain torch, nothing is kept without a reason."""
    assert not [outcome.wrong for outcome in outcomes if outcome.wrong]
    assert not [outcome.refused for outcome in outcomes if outcome.refused]
    assert not [outcome for outcome in outcomes if outcome.again < outcome.asked and not outcome.kept]


@pytest.mark.parametrize("name", EVERY_DAY)
def test_module_is_exact(name: str) -> None:
    assert_exact(sweep(NAMED[name], torch.float32, at_most=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=GUARDS.get(d, ())) for d in DTYPES], ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_is_exact_in_every_dtype(info: ModuleInfo, dtype: torch.dtype) -> None:
    assert_exact(sweep(info, dtype, at_most=None if dtype == torch.float32 else 5))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_modules_are_exact_wherever_they_stand(place: str) -> None:
    found = wrong_at(PLACES[place], torch.float32, at_most=2)
    assert sum(map(len, found.values())) > 300
    assert not {name: wrong for name, of in found.items() if (wrong := [w for one in of for w in one])}


def test_the_sweep_makes_modules_run_again() -> None:
    assert any(outcome.again for outcome in sweep(NAMED["nn.BatchNorm1d"], torch.float32, at_most=2))


@pytest.mark.parametrize("form", FORMS)
def test_statistics_that_are_updated_twice_are_seen(form: str) -> None:
    """The sweep's own eyes: torch.utils.checkpoint is known to do that."""
    with quiet():
        found = [beside(case, form) for case in cases(NAMED["nn.BatchNorm1d"], torch.float32)]
    assert any("num_batches_tracked" in (what or "") for what in found)
    assert "" in found  # in evaluation, say, there is nothing to do twice


def test_the_sweep_sees_a_wrong_gradient_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_a_bit(monkeypatch, when=lambda entry: torch._C._current_graph_task_id() >= 0)  # in the backward
    monkeypatch.setattr(SelfCheck, "remade", lambda *args: None)
    wrong = [w for outcome in sweep(NAMED["nn.Linear"], torch.float32, at_most=1) for w in outcome.wrong]
    assert "gradient of operator.call.weight" in wrong, wrong
