"""Calls that look at numbers: lengths, batch sizes, indices, whose backward looks at them once more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import autoremat
from tests.engines.torch.compare import quick  # noqa: F401 - a fixture for every test


class Packed(nn.Module):
    """A recurrent network on sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Linear(8, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """One number."""
        packed = pack_padded_sequence(torch.relu(self.embed(x)), lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.out(h).square().mean()


@pytest.mark.slow
@pytest.mark.guard
def test_packed_sequences_are_planned(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    plain = Packed()
    net = copy.deepcopy(plain)
    step = autoremat.checkpoint(net, budget=0.97)
    for lengths in (torch.tensor([6, 5, 3, 1]), torch.tensor([5, 5, 2, 2])):
        x = torch.randn(4, 6, 8)
        for call in (plain, step):
            call(x, lengths).backward()
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
    stats = autoremat.stats(step)
    assert stats.planned >= 1
    assert not stats.unplanned, [str(w.message) for w in recwarn]


class Box:
    """Hides a tensor from the kind of input."""

    def __init__(self, rows: int) -> None:
        self.x = torch.randn(rows, 16)


@pytest.mark.filterwarnings("ignore:autoremat")
def test_larger_results_are_noticed_in_a_tuple_too() -> None:
    weight = torch.randn(16, 16, requires_grad=True)

    def step(box: Box) -> Tensor:
        values, _ = box.x.sort(0)
        return (values @ weight).sin().sum()

    checkpointed = autoremat.checkpoint(step, budget=1.0)
    checkpointed(Box(64)).backward()
    checkpointed(Box(32)).backward()
    assert autoremat.stats(checkpointed).deviations == 0
    box = Box(128)
    checkpointed(box).backward()
    assert autoremat.stats(checkpointed).deviations == 1
