"""What ``torch.utils.checkpoint`` gets wrong, twice or not at all, is right under autoremat, or refused clearly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autoremat
from tests.engines.torch.compare import off_by_a_bit, quick
from tests.engines.torch.eager.behaviour import AUTOREMAT, CASES, inputs, outcome, outcomes_of, row, shifted

__all__ = ["quick"]  # a fixture

PAGE = Path(__file__).parents[4] / "docs" / "beside-checkpoint.md"


@pytest.mark.parametrize("title", CASES)
def test_right_or_refused_and_as_the_page_says(title: str) -> None:
    found = outcomes_of(title)
    mine = found[AUTOREMAT]
    assert mine.kind in ("right", "plainly", "error"), mine
    if mine.kind == "error":
        assert "modified by an inplace operation" in mine.message
        assert "autoremat needs it as it was to run aten.add.Tensor in the step" in mine.message
        assert "behaviour.py:" in mine.message
    if mine.kind == "plainly":
        assert "running without checkpointing" in mine.message
    assert row(title, found) in PAGE.read_text(encoding="utf-8"), "run benchmarks/behaviour.py --write"


def test_the_page_has_no_other_rows() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("<!-- benchmarks/behaviour.py -->")[2].partition("<!-- end")[0]
    titles = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")]
    assert titles[2:] == list(CASES)


def test_a_wrong_gradient_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_a_bit(monkeypatch, when=lambda entry: torch._C._current_graph_task_id() >= 0)
    title = "numbers from NumPy"
    assert outcome(CASES[title], AUTOREMAT).kind in ("silent", "error")


def test_what_the_refusal_advises_helps() -> None:
    """Kept, or a clone handed over: exact although the tensor changes after the call."""

    def step(call: Any, pass_on: Any) -> torch.Tensor:
        torch.manual_seed(0)
        x, shift = inputs(), torch.randn(4)
        y = call(x, pass_on(shift))
        shift.add_(1)
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    plain = step(shifted, lambda t: t)
    budget = lowest(step)
    kept = autoremat.checkpoint(shifted, budget=1.0, keep="aten.add.Tensor", recompute="aten.tanh.default")
    assert torch.equal(step(kept, lambda t: t), plain)
    assert autoremat.stats(kept).reruns > 0
    cloned = autoremat.checkpoint(shifted, budget=budget)
    assert torch.equal(step(cloned, torch.clone), plain)
    assert autoremat.stats(cloned).reruns > 0
    with pytest.raises(RuntimeError, match="autoremat needs it as it was"):
        step(autoremat.checkpoint(shifted, budget=budget), lambda t: t)


def lowest(step: Any) -> int:
    """The floor of a step."""
    with pytest.raises(autoremat.InfeasibleBudget) as caught:
        step(autoremat.checkpoint(shifted, budget=1), torch.clone)
    return caught.value.floor_bytes
