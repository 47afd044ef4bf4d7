from __future__ import annotations

import pytest
import torch
from torch import nn

from autoremat.engines.torch.world.memory_account import _add_up, account, resident


def test_two_tensors_by_hand() -> None:
    def step() -> None:
        a = torch.empty(1000)
        b = torch.empty(1000)
        del a
        c = torch.empty(500)
        del b, c

    assert account(step, 100).resident_bytes == (4100, 8100, 4100, 6100, 2100, 100)


def test_peak_and_end_by_hand() -> None:
    kept = []
    seen = account(lambda: kept.append(torch.empty(1000).new_empty(250)), 50)
    assert seen.peak_bytes == 50 + 4000 + 1000
    assert seen.end_bytes == 50 + 1000
    assert seen.before_bytes == 50
    assert len(kept) == 1


def test_nothing_allocated_is_what_was_before() -> None:
    seen = account(lambda: None, 7)
    assert (seen.peak_bytes, seen.end_bytes, seen.resident_bytes) == (7, 7, ())


def test_backward_by_hand() -> None:
    w, x = torch.ones(1000, requires_grad=True), torch.ones(1000)

    def step() -> None:
        (w * x).exp().sum().backward()

    seen = account(step, resident(w, x))
    # On top of w and x: w * x, its exp; only exp, the loss, its gradient; exp beside its gradient; at the end w.grad.
    assert seen.before_bytes == 8000
    assert seen.resident_bytes[:5] == (12_000, 16_000, 12_000, 12_004, 12_008)
    assert seen.peak_bytes == 16_008
    assert seen.end_bytes == resident(w, x) + w.grad.nbytes == 12_000


def test_temporaries_inside_kernels_are_seen() -> None:
    x = torch.randn(100, 1000)
    seen = account(lambda: torch.logsumexp(x, 1))
    assert seen.peak_bytes >= x.nbytes
    assert seen.end_bytes == 0


def test_the_account_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    x = torch.randn(4, 3, 8, 8)

    def step() -> None:
        model(x).sum().backward()

    accounts = []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        accounts.append(account(step, resident(model, x)).resident_bytes)
    assert accounts[0] == accounts[1] == accounts[2]


def test_a_release_of_an_older_block_is_left_out() -> None:
    events = [(10, 1, 64), (20, 99, -4096), (30, 1, -64), (40, 1, 32)]
    seen = _add_up(events, 1000)
    assert seen.resident_bytes == (1064, 1064, 1000, 1032)
    assert seen.seconds == pytest.approx((0.0, 1e-8, 2e-8, 3e-8))


def test_resident_counts_parameters_buffers_gradients_and_optimizer_state_once() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    model.append(nn.Linear(10, 10, bias=False))
    model[2].weight = model[0].weight
    parameters, buffers = 400 + 40 + 40, 40 + 40 + 8
    assert resident(model) == parameters + buffers
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 10)).sum().backward()
    assert resident(model) == 2 * parameters + buffers
    optimizer.step()
    assert resident(model, optimizer) == 4 * parameters + buffers + 3 * 4  # one step counter for each parameter


def test_resident_counts_views_of_one_storage_once() -> None:
    x = torch.zeros(10, 10)
    assert resident(x, x[3:], x.t()) == 400
