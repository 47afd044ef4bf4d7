from __future__ import annotations

import torch
from torch import nn

from autoremat.engines.torch.eager.dry_run import record
from autoremat.program import simulate


def model_on(device: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).to(device)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


def test_gradients_that_are_there_count_on_meta_as_on_a_device() -> None:
    on_meta, on_cpu = (
        record(model_on(device), [torch.ones(8, 16, device=device)], timing="estimate", device="cpu")
        for device in ("meta", "cpu")
    )
    assert sum(v.nbytes for v in on_meta.values if v.fixed and v.kind == "gradient") == 2 * (16 * 16 + 16) * 4
    assert on_meta.fixed_bytes == on_cpu.fixed_bytes
    assert simulate(on_meta).peak_bytes == simulate(on_cpu).peak_bytes
