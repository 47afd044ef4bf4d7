"""The program of a larger input, foreseen from two recordings: never smaller than the real one, and not much larger."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from autoremat.api import record_step
from autoremat.demo.models import GPT, GPTConfig
from autoremat.planner.growth import grown, grown_number, is_same, shrunk, shrunk_number
from autoremat.program import Program
from tests.fixed import examples


@examples(200)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=4),
    st.integers(2, 200),
    st.floats(1.05, 3.0),
    st.floats(1.01, 3.0),
)
def test_a_polynomial_is_bounded_from_above(coefficients: list[int], n: int, between: float, further: float) -> None:
    def value(size: float) -> int:
        return int(sum(c * size**k for k, c in enumerate(coefficients)))

    middle, last = n * between, n * between * further
    assert grown_number(value(n), value(middle), between, further) >= value(last) * (1 - 0.02 * 3 * further) - 4


@examples(200)
@given(
    st.integers(0, 1000), st.integers(1, 50), st.integers(1, 3), st.integers(2, 200), st.floats(1.05, 3.0),
    st.floats(0.1, 1.0),
)  # fmt: skip
def test_a_smaller_size_is_bounded_from_above(
    c: int, factor: int, power: int, n: int, between: float, to: float
) -> None:
    def value(size: float) -> float:
        return c + factor * size if power == 1 else factor * size**power

    bound = shrunk_number(round(value(n)), round(value(n * between)), between, to)
    assert bound >= value(n * between * to) * 0.98 - 4
    assert bound <= round(value(n * between))


@cache
def gpt_step(n: int, rows: int = 4) -> Program:
    torch.manual_seed(0)
    model = GPT(GPTConfig(blocks=2, width=32, context=256))
    x = torch.zeros(rows, n, dtype=torch.int64)
    return record_step(lambda: F.cross_entropy(model(x).flatten(0, 1), x.flatten()), (), {}, None, "estimate")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sizes", [(40, 60, 90), (64, 66, 132), (16, 100, 150)])
def test_a_real_step_takes_no_more_than_foreseen(sizes: tuple[int, int, int]) -> None:
    small, large, largest = map(gpt_step, sizes)
    foreseen = grown(small, large, sizes[1] / sizes[0], sizes[2] / sizes[1])
    assert foreseen is not None
    assert is_same(foreseen, largest)
    assert all(a.nbytes >= b.nbytes for a, b in zip(foreseen.values, largest.values, strict=True))
    assert sum(v.nbytes for v in foreseen.values) <= 1.05 * sum(v.nbytes for v in largest.values)


def test_a_smaller_real_step_takes_no_more_than_foreseen() -> None:
    small, large, smallest = map(gpt_step, (60, 64, 40))
    foreseen = shrunk(small, large, 64 / 60, 40 / 64)
    assert foreseen is not None
    assert is_same(foreseen, smallest)
    assert all(a.nbytes >= b.nbytes for a, b in zip(foreseen.values, smallest.values, strict=True))
    assert sum(v.nbytes for v in foreseen.values) <= 1.05 * sum(v.nbytes for v in smallest.values)


def test_other_steps_foresee_nothing() -> None:
    assert grown(gpt_step(40), gpt_step(40), 1.0, 2.0) is None
    x = torch.ones(4, requires_grad=True)
    other = record_step(lambda: x.sin().sum(), (), {}, None, "estimate")
    assert grown(other, gpt_step(40), 2.0, 2.0) is None
