"""Every differentiable operator that torch knows, with everything computed again that may be, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing._internal.opinfo.core import OpInfo

from autoremat.engines.torch.eager.check import SelfCheck
from autoremat.engines.torch.eager.dry_run import record
from autoremat.program import Once
from tests.engines.torch.compare import off_by_a_bit
from tests.engines.torch.eager.sweeps.choice import REFUSED, STEADY, UNSTEADY, operators_at
from tests.engines.torch.eager.sweeps.sweep import (
    DTYPES,
    OPERATORS,
    PLACES,
    Outcome,
    is_steady,
    name_of,
    sweep,
    wrong_at,
)

GUARDS = {torch.bfloat16: pytest.mark.guard}
"""The dtype that guards the most beside everyday's float32: what models are trained in, and kernels of its own."""

LONG = pytest.mark.slow, pytest.mark.guard
"""Of what takes as long as many other tests together."""

NAMED = {name_of(op): op for op in OPERATORS}


def assert_exact(op: OpInfo, outcomes: list[Outcome]) -> None:
    """Nothing is wrong, nothing is left out without being in the table, nothing is kept without a reason."""
    assert not [outcome.wrong for outcome in outcomes if outcome.wrong]
    assert name_of(op) in REFUSED or not [outcome.refused for outcome in outcomes if outcome.refused]
    assert not [outcome for outcome in outcomes if outcome.again < outcome.asked and not outcome.kept]


@pytest.mark.one_in(5, guard=True)
@pytest.mark.parametrize("op", STEADY, ids=name_of)
def test_operator_is_exact(op: OpInfo) -> None:
    assert_exact(op, sweep(op, [torch.float32], at_most=2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(d, marks=GUARDS.get(d, ())) for d in DTYPES], ids=str)
@pytest.mark.parametrize("op", STEADY, ids=name_of)
def test_operator_is_exact_in_every_dtype(op: OpInfo, dtype: torch.dtype) -> None:
    assert_exact(op, sweep(op, [dtype], at_most=10))


def wrong_everywhere(place: str, dtype: torch.dtype, at_most: int, every: int = 1) -> dict[str, list[str]]:
    """Of all operators that may stand in this place, or one in so many; there are many."""
    found = {name_of(op): wrong_at(PLACES[place], op, dtype, at_most) for op in operators_at(PLACES[place])[::every]}
    assert sum(map(len, found.values())) > 200 / every
    return {name: wrong for name, of in found.items() if (wrong := [w for one in of for w in one])}


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=LONG)], ids=["some", "all"])
@pytest.mark.parametrize("place", PLACES)
def test_operators_are_exact_wherever_they_stand(place: str, every: int) -> None:
    assert not wrong_everywhere(place, torch.float32, at_most=1, every=every)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_exact_wherever_they_stand_in_every_dtype(place: str, dtype: torch.dtype) -> None:
    at_most = {"in a model": 3, "with a second gradient in the forward": 1}.get(place, 2)  # the benchmark looks at four
    assert not wrong_everywhere(place, dtype, at_most)


@pytest.mark.slow
@pytest.mark.parametrize("place", [name for name, place in PLACES.items() if not place.is_differentiated])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool], ids=str)
def test_operators_are_exact_on_data_of_other_dtypes(place: str, dtype: torch.dtype) -> None:
    assert not wrong_everywhere(place, dtype, at_most=2)


@pytest.mark.parametrize("name", UNSTEADY)
def test_operators_left_out_may_differ_from_themselves(name: str) -> None:
    """Where a build of torch is steady, they are as exact as all others."""
    if is_steady(NAMED[name]):
        wrong = [outcome.wrong for outcome in sweep(NAMED[name], [torch.float32], at_most=2) if outcome.wrong]
        assert not wrong, wrong


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_samples_are_refused_by_plain_torch(name: str) -> None:
    assert any(outcome.refused for outcome in sweep(NAMED[name], DTYPES, at_most=10)), f"{name} can go from the table"


@pytest.mark.parametrize("name", ["exp", "matmul", "nn.functional.dropout", "nn.functional.batch_norm", "linalg.eigh"])
def test_the_sweep_makes_operators_run_again(name: str) -> None:
    outcomes = sweep(NAMED[name], [torch.float32], at_most=10)
    assert any(outcome.again for outcome in outcomes)
    assert any(outcome.random for outcome in outcomes) == (name == "nn.functional.dropout")


def test_the_sweep_sees_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape whose reruns are off by a bit is caught."""
    off_by_a_bit(monkeypatch, when=lambda entry: torch._C._current_graph_task_id() >= 0)  # in the backward
    monkeypatch.setattr(SelfCheck, "remade", lambda *args: None)
    wrong = [w for outcome in sweep(NAMED["exp"], [torch.float32], at_most=1) for w in outcome.wrong]
    assert any("gradient" in w or "loss" in w for w in wrong), wrong


# ---- what the sweep has found ------------------------------------------------------------------------------------


def test_a_fake_view_without_elements_is_a_view() -> None:
    """Torch gives it a storage of its own when it meets it for the first time, and the right one later."""
    bilinear = torch.nn.Bilinear(8, 8, 8)

    def loss_fn(x: Tensor) -> Tensor:
        return bilinear(x * 2, x * 3).sum()

    empty = torch.ones(0, 8, requires_grad=True)
    torch._subclasses.FakeTensorMode.cache_clear()
    first, second = (record(loss_fn, (empty,), timing="estimate") for _ in range(2))
    assert [(op.name, op.reads) for op in first.ops] == [(op.name, op.reads) for op in second.ops]


def test_kernels_may_conjugate_lazily() -> None:
    """Inside a dispatch mode torch forgets the conjugation that the kernel of pinv asks for."""
    outcomes = sweep(NAMED["linalg.pinv"], [torch.complex64], at_most=2)
    assert [outcome.wrong for outcome in outcomes] == [(), ()]
    assert any(outcome.again for outcome in outcomes)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_matrix_products_can_be_recorded_without_a_device_to_measure_on() -> None:
    mask = torch.eye(4).to_sparse_csr()

    def loss_fn(x: Tensor) -> Tensor:
        return torch.sparse.sampled_addmm(mask, x.exp(), x.exp()).to_dense().sum()

    assert record(loss_fn, (torch.ones(4, 4, requires_grad=True),), timing="estimate").timing == "estimated"


def test_what_differs_from_run_to_run_is_kept() -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2)
    program = record(lambda a, b: torch.linalg.lstsq(a.sin(), b).solution.exp().sum(), (a, b), timing="estimate")
    (reason,) = {op.why for op in program.ops if op.name.startswith("aten.linalg_lstsq")} - {Once.BACKWARD.value}
    assert reason == "gives other last bits from run to run"
