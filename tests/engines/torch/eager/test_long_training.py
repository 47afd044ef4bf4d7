"""2,000 steps: nothing drifts away from plain training, and nothing piles up."""

from __future__ import annotations

import gc

import pytest
import torch

import autoremat
from tests.engines.torch.eager.long_training import EVERY, OTHER_PATHS, STEPS, is_tape, pair, train


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:autoremat:RuntimeWarning")
def test_two_thousand_steps() -> None:
    plain, mine = pair()
    gc.collect()
    others = list(filter(is_tape, gc.get_objects()))  # what other tests have left, held so that it stays to be counted
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, _ = train(plain)
        got, counts = train(mine, EVERY)
    finally:
        torch.set_num_threads(threads)
    stats = autoremat.stats(mine)
    assert stats.reruns > 5 * STEPS
    assert stats.deviations >= len(OTHER_PATHS)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    settled = counts[2:]  # by then every kind of input has its plan, or is known to have none
    assert all(c["tapes"] == len(others) for c in settled), counts
    assert len({c["tensors"] for c in settled}) == 1, counts
    assert max(c["objects"] for c in settled) - min(c["objects"] for c in settled) < 100, counts
    assert settled[-1]["resident"] - settled[0]["resident"] < 2 << 20, counts
