"""What a recording has left is looked for among what is young, not among all that a user has."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.world import apart

OLDEST = 2


@pytest.mark.parametrize("depth", [2, 12])
def test_old_objects_are_not_looked_through(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several frameworks loaded that took a second for every recording."""
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
    monkeypatch.setattr(apart._Here, "cannot", True)  # else it happens in a child
    collect, generations = gc.collect, list[int]()
    monkeypatch.setattr(gc, "collect", lambda generation=OLDEST: generations.append(generation) or collect(generation))
    gc.disable()  # what is automatic may make old what the recording has made
    try:
        assert record(lambda x: net(x).sum(), (torch.randn(4, 8),), timing="estimate").ops
    finally:
        gc.enable()
    assert OLDEST not in generations
