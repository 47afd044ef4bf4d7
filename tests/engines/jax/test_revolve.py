"""Long recurrences beside Revolve (Griewank and Walther, 2000), whose forward steps are the fewest there can be."""

from __future__ import annotations

import math
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional

import autoremat.jax as aj  # noqa: E402
from autoremat.engines.jax import scans, variants  # noqa: E402
from autoremat.engines.jax.scans import Choice  # noqa: E402
from tests.engines.jax.models import QUIET, checkpoint, recurrence, recurrence_parameters  # noqa: E402

pytestmark = pytest.mark.filterwarnings(QUIET)


def revolve(length: int, states: int) -> int:
    """Extra forward steps of a chain, of which so many states are there at the same time, the first one included."""
    times = next(r for r in range(length) if math.comb(states + r, states) >= length)
    return times * length - math.comb(states + times, times - 1) - (length - 1)


def by_search(length: int, states: int) -> int:
    """The same by trying every place for the next state to be kept."""
    steps = {(1, s): 0 for s in range(1, states + 1)}
    for n in range(2, length + 1):
        steps[n, 1] = n * (n - 1) // 2
        for s in range(2, states + 1):
            steps[n, s] = min(k + steps[k, s] + steps[n - k, s - 1] for k in range(1, n))
    return steps[length, states] - (length - 1)


@pytest.mark.parametrize("length", [2, 7, 12, 25])
@pytest.mark.parametrize("states", [1, 2, 3, 5])
def test_the_closed_form_is_what_a_search_finds(length: int, states: int) -> None:
    assert revolve(length, states) == by_search(length, states)


def fewest_states(length: int, levels: int) -> int:
    """Of all ladders with so many levels: beginnings of segments, and the states of one that is run again."""
    kept = scans.Kept(None, 1, 0, 0.0)  # type: ignore[arg-type]
    return min(scans._bytes_of(length, s, kept, 1, 0) for s in scans.ladders(length) if len(s) == levels)


ROWS = [(100, 1, 20, 100, 79), (1024, 1, 64, 1024, 959), (1024, 2, 31, 2048, 1488), (997, 2, 30, 1994, 1467)]


@pytest.mark.parametrize(("length", "levels", "states", "extra", "least"), ROWS)
def test_extra_steps_beside_the_fewest(length: int, levels: int, states: int, extra: int, least: int) -> None:
    """Regular segments, which are one loop in a loop for XLA, cost at most half as much again."""
    assert fewest_states(length, levels) == states
    assert levels * length == extra
    assert revolve(length, states) == least
    assert least <= extra <= 1.5 * least


def steps_of(jaxpr: Any, times: int = 1) -> int:
    """How often a step of the recurrence runs: its only hyperbolic tangent."""
    count = 0
    for eqn in jaxpr.eqns:
        count += times * (str(eqn.primitive) == "tanh")
        inner = [p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        for one in inner:
            count += steps_of(getattr(one, "jaxpr", one), times * eqn.params.get("length", 1))
    return count


@pytest.mark.parametrize("segments", [(), (8,), (16, 4), (11,)])
def test_a_plan_runs_as_many_steps_as_its_segments_say(
    segments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and once more for each level."""
    args = recurrence_parameters(4), jnp.ones((64, 2, 4))
    monkeypatch.setattr(variants, "chosen", lambda choices, price: Choice(segments, choices[-1].body, 0, 0.0))
    traced = jax.make_jaxpr(jax.grad(checkpoint(recurrence, budget=1.0)))(*args)
    assert steps_of(traced.jaxpr) == 64 * (1 + len(segments))


def test_a_plan_of_a_long_recurrence_takes_steps_for_memory() -> None:
    """In a fifth of the memory two further runs of each step at most."""
    args = recurrence_parameters(16), jnp.ones((256, 8, 16))
    plan = aj.plan(recurrence, *args, budget=1.0, time_limit_seconds=0.2)
    fixed = plan.program.fixed_bytes
    budget = fixed + (plan.plain_peak_bytes - fixed) // 5
    traced = jax.make_jaxpr(jax.grad(checkpoint(recurrence, budget=budget)))(*args)
    assert 256 < steps_of(traced.jaxpr) <= 3 * 256
