"""Inputs of several sizes: what is planned for the largest serves the smaller ones; a larger one is planned anew."""

from __future__ import annotations

import pytest
import torch

import autoremat
from tests.engines.torch.compiled.cases import Regression, peak, rows, same, train

SIZES = (96, 64, 112)


@pytest.mark.parametrize("dynamic", [True, pytest.param(None, marks=pytest.mark.slow)])
def test_every_size_stays_within_the_budget(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model, plain = Regression(0.3), Regression(0.3)
    plain.load_state_dict(model.state_dict())
    data = [rows(n) for n in SIZES]
    known = torch.compile(plain, backend="aot_eager", dynamic=dynamic)
    left = [train(plain, known, given) for given in data]
    full = peak(plain, known, data[0])
    torch._dynamo.reset()
    autoremat.checkpoint(model, budget=int(0.95 * full), time_limit_seconds=1)
    call = torch.compile(model, backend="aot_eager", dynamic=dynamic)
    for given, before in zip(data[:2], left, strict=False):
        assert same(train(model, call, given), before)
        assert peak(model, call, given) <= 0.95 * full
    planned = autoremat.stats(model).planned
    assert dynamic is None or planned == 1
    assert same(train(model, call, data[2]), left[2])
    assert autoremat.stats(model).planned == planned + 1
    assert peak(model, call, data[2]) <= 0.95 * full
