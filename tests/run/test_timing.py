"""What operators are timed on."""

from __future__ import annotations

import pytest
import torch

from recollect.record import timing
from recollect.record.signature import CallSignature, signature_of


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
