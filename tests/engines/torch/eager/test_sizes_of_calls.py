"""What is known of a call: of sizes that are new in every step only a few are looked at, and the facts are right."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from autoremat.engines.torch.eager import facts
from autoremat.engines.torch.eager.arguments import tensors_given
from autoremat.engines.torch.eager.facts import CallFacts, facts_of_call
from autoremat.engines.torch.eager.state import State


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests have looked at."""
    monkeypatch.setattr(facts, "_KNOWN", {})
    monkeypatch.setattr(facts, "_OF_OTHER_SIZES", {})
    monkeypatch.setattr(facts, "MANY_SIZES", facts.MANY_SIZES)


def told(func: Any, *args: Any, **kwargs: Any) -> CallFacts:
    """What is known of a call."""
    return facts_of_call(func, args, kwargs, State.now(), is_plain=True)


def looked_at(func: Any, *args: Any, **kwargs: Any) -> CallFacts:
    """The facts of a call, looked at for itself."""
    return facts._probed(func, args, kwargs, tensors_given(args, kwargs))


def without_estimates(found: CallFacts) -> CallFacts:
    """All that must be right."""
    return dataclasses.replace(found, nbytes=0, seconds=0.0)


def test_few_of_many_sizes_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    n_looks = 0

    def counted(*args: Any) -> CallFacts:
        nonlocal n_looks
        n_looks += 1
        return probed(*args)

    probed = facts._probed
    monkeypatch.setattr(facts, "_probed", counted)
    dice, weight = random.Random(0), torch.randn(8, 32)
    for _ in range(300):
        told(F.linear, torch.randn(dice.randint(1, 2000), 32), weight)
    assert n_looks <= facts.MANY_SIZES + 16


CALLS = {
    "linear": lambda a, b: (F.linear, torch.randn(a, b), torch.randn(3, b)),
    "add to a slice": lambda a, b: (torch.Tensor.add_, torch.randn(a, 2 * b)[:, :b], 1.0),
    "a column": lambda a, b: (torch.Tensor.__getitem__, torch.randn(a, b), (slice(None), 0)),
    "transposed": lambda a, b: (torch.Tensor.contiguous, torch.randn(a, b).t()),
    "view": lambda a, b: (torch.Tensor.view, torch.randn(a, b), (b, a)),
    "reshape": lambda a, b: (torch.Tensor.reshape, torch.randn(a, b).t(), (a, b)),
    "expand": lambda a, b: (torch.Tensor.expand, torch.randn(1, b), (a, b)),
    "copy over": lambda a, b: (torch.Tensor.copy_, torch.randn(a, b), torch.randn(b)),
    "zeros": lambda a, b: (torch.zeros, a, b),
    "empty": lambda a, b: (torch.empty, a, b),
    "batch norm": lambda a, b: (F.batch_norm, torch.randn(a, b), torch.zeros(b), torch.ones(b), None, None, True),
    "dropout": lambda a, b: (F.dropout, torch.randn(a, b), 0.5),
    "topk": lambda a, b: (torch.topk, torch.randn(a, b), min(b, 12)),
}


@given(name=st.sampled_from(sorted(CALLS)), sizes=st.tuples(*[st.integers(0, 40)] * 4))
def test_what_must_be_right_is_that_of_the_call_itself(name: str, sizes: tuple[int, int, int, int]) -> None:
    facts._KNOWN.clear(), facts._OF_OTHER_SIZES.clear()
    facts.MANY_SIZES = 1  # type: ignore[misc]
    for a, b in (sizes[:2], sizes[2:]):
        if name == "batch norm" and a < 2:
            continue
        func, *args = CALLS[name](a, max(b, 1))
        found, right = told(func, *args), looked_at(func, *args)
        assert without_estimates(found) == without_estimates(right)
        if name != "reshape":  # of some sizes it makes a view, of others a copy
            assert right.nbytes <= found.nbytes <= 4 * right.nbytes


def test_a_call_of_sizes_near_to_known_ones_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 32)
    known = told(F.linear, torch.randn(100, 32), weight)
    assert told(F.linear, torch.randn(150, 32), weight).nbytes == 150 * 8 * 4  # too far away: looked at
    monkeypatch.setattr(facts, "_probed", None)
    larger, smaller = told(F.linear, torch.randn(110, 32), weight), told(F.linear, torch.randn(90, 32), weight)
    assert without_estimates(larger) == without_estimates(known)
    assert 110 * 8 * 4 <= larger.nbytes <= 1.25 * 110 * 8 * 4
    assert smaller == known


def test_a_number_that_is_no_size_is_looked_at_for_itself() -> None:
    x = torch.randn(12, 12)
    assert told(F.dropout, x, 0.5).random
    assert not told(F.dropout, x, 0.5, False).random
    assert told(torch.Tensor.mul, x, 0.5) is told(torch.Tensor.mul, x, 0.25)
