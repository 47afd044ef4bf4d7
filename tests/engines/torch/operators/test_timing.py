"""What operators are timed on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.operators import timing
from autoremat.engines.torch.operators.signature import CallSignature, signature_of
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.program import simulate


@pytest.mark.parametrize(
    ("left", "right", "ends"),
    [
        ((64, 32), (4, 32, 16), [16, 32, 48, 64]),  # rows of the first matrix
        ((4, 8, 32), (32, 48), [12, 24, 36, 48]),  # columns of the second
        ((8, 40), (40, 16), [10, 20, 30, 40]),  # what both sum over
    ],
)
def test_groups_have_rows(
    left: tuple[int, ...], right: tuple[int, ...], ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the zeros that other integers are, a grouped product would have nothing to do and look free."""
    seen = []

    def watched(func: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], cuda: bool) -> float:
        seen.append(next(t for t in (*args, *kwargs.values()) if t.dtype is torch.int32).tolist())
        return 1.0

    monkeypatch.setattr(timing, "_time_once", watched)
    monkeypatch.setattr(timing, "_memory_cpu", lambda func, args, kwargs: (0, ()))
    given = torch.rand(left), torch.rand(right), torch.zeros(4, dtype=torch.int32)
    signature = signature_of(torch.ops.aten._grouped_mm.default, given, {})
    assert isinstance(signature, CallSignature)
    timing._measure_for_real(signature, None)
    assert seen == [ends]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_scratch_of_an_lstms_backward_is_in_the_account(layers: int, bias: bool, bidirectional: bool) -> None:
    """Its kernel reads pointers out of what the forward wrote: it cannot be run on any bytes."""
    torch.manual_seed(0)
    lstm = nn.LSTM(32, 64, layers, bias=bias, bidirectional=bidirectional, batch_first=True)
    x = torch.randn(8, 16, 32)

    def step(x: torch.Tensor) -> torch.Tensor:
        return lstm(x)[0].square().mean()  # type: ignore[no-any-return]

    predicted = simulate(record(step, (x,), timing="measure")).peak_bytes
    step(x).backward()
    lstm.zero_grad()
    measured = account(lambda: step(x).backward(), resident(lstm, x)).peak_bytes
    assert abs(measured - predicted) <= 4 * 64 * 4  # one gradient for two biases, which autograd copies


def test_the_first_recording_of_an_lstm_is_that_of_every_later_one() -> None:
    """The fake kernel returns one gradient for two biases, torch's cache of fake kernels two, as the real one."""
    layer, x = nn.LSTM(32, 64, batch_first=True), torch.randn(8, 20, 32)
    FakeTensorMode.cache_clear()
    first, second = (record(lambda: layer(x)[0].square().mean(), timing="estimate") for _ in range(2))
    assert [(op.name, op.writes) for op in first.ops] == [(op.name, op.writes) for op in second.ops]
    assert simulate(first).peak_bytes == simulate(second).peak_bytes
