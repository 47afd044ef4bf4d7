"""A training step run twice, plainly and checkpointed, and everything it leaves behind compared to the last bit."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoremat
import autoremat.engines.torch.eager.options
from autoremat.engines.torch.eager.entry import Entry
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.stats import Stats
from autoremat.engines.torch.eager.tape import Reports, Tape
from autoremat.engines.torch.operators.timing import Cost
from autoremat.planner.search.calls import planned_as, unfolded
from autoremat.planner.search.unrolled import unroll
from autoremat.program import Plan, Program, Schedule, simulate

FRACTIONS: tuple[float, ...] = ()
"""The budgets of this test, beside the floor."""

ENDS_EARLY = False
"""Whether one budget under which operators ran again is enough: every day, but on a device."""


@pytest.fixture(autouse=True, params=["", pytest.param("thorough", marks=pytest.mark.slow)])
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator costs the same, and a program recorded twice is planned from what is known of it already.

    How good the plans are is not the question here, and both save most of the time.
    """
    programs: dict[Any, Program] = {}

    def solve(program: Program, budget: Any, **options: Any) -> Plan:
        known = programs.setdefault((program.values, program.ops), program)
        return autoremat.solve(known, budget, **options | {"time_limit_seconds": 0.02})

    def costs(signatures: Any, *rest: Any, **options: Any) -> list[Cost]:
        return [Cost(0.0 if s is None else 1e-6) for s in signatures]

    everyday = not request.param and request.node.get_closest_marker("gpu") is None
    monkeypatch.setattr(sys.modules[__name__], "FRACTIONS", (0.9, 0.7, 0.5) if request.param else (0.6,))
    monkeypatch.setattr(sys.modules[__name__], "ENDS_EARLY", everyday)
    monkeypatch.setattr(autoremat.engines.torch.eager.options, "solve", solve)
    monkeypatch.setattr(sys.modules["autoremat.engines.torch.recording.whole"], "measure_all", costs)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class World:
    """A fresh world: what is checkpointed, and a step that is given the callable to use.

    Attributes:
        target: a module or a callable.
        step: called with the target, plain or checkpointed; returns anything whose tensors must be the same.
        modules: modules whose gradients and buffers must be the same, beside ``target`` itself.
        extra: further tensors, generators or plain values that must be the same at the end.
    """

    target: Any
    step: Callable[[Any], Any]
    modules: tuple[nn.Module, ...] = ()
    extra: Callable[[], Any] = lambda: None

    def roots(self) -> list[nn.Module]:
        return [m for m in (self.target, *self.modules) if isinstance(m, nn.Module)]


def seeded(build: Callable[[], World]) -> World:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    return build()


def observe(world: World, call: Any, steps: int) -> list[Any]:
    """Every number of several steps, each under its name."""
    seen: list[Any] = []
    for k in range(steps):
        results = world.step(call)
        for i, leaf in enumerate(torch.utils._pytree.tree_leaves(results)):
            seen.append((f"step {k}, result {i}", frozen(leaf)))
        for root in world.roots():
            for name, p in root.named_parameters():
                seen.append((f"step {k}, gradient of {name}", frozen(p.grad)))
            for name, b in root.named_buffers():
                seen.append((f"step {k}, buffer {name}", frozen(b)))
    assert all(x.isfinite().all() for _, x in seen if isinstance(x, Tensor)), "numbers out of range hide mistakes"
    for i, leaf in enumerate(torch.utils._pytree.tree_leaves(world.extra())):
        seen.append((f"extra {i}", frozen(leaf)))
    numpy_state = np.random.get_state()
    seen.append(("torch generator", torch.get_rng_state()))
    seen.append(("python generator", random.getstate()))
    seen.append(("numpy generator", (numpy_state[1].tolist(), numpy_state[2])))
    return seen


def frozen(x: Any) -> Any:
    if isinstance(x, Tensor):
        x = x.detach()
        return (x.coalesce().to_dense() if x.layout is torch.sparse_coo else x).clone()
    return x.get_state() if isinstance(x, torch.Generator) else x


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(bytes_of(a), bytes_of(b))
    return type(a) is type(b) and a == b


def bytes_of(t: Tensor) -> Tensor:
    return t.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def off_path(reports: Reports | None = None) -> Tape:
    """A tape whose first call leaves the path, and whose budget has room for nothing."""
    return Tape(Script((), (), (), frozenset(), (), frozenset(), budget_bytes=0), reports)


def off_by_a_bit(monkeypatch: pytest.MonkeyPatch, when: Callable[[Any], bool] = lambda entry: True) -> None:
    """Calls that are made again give something else than the first time: one bit of each result."""
    plain = Entry.run

    def run(self: Entry, memory: Any, replay: Any, wanted: Any) -> Any:
        made = plain(self, memory, replay, wanted)
        for tensor in made.values():
            storage = tensor.untyped_storage()
            if storage.nbytes() and when(self):
                storage[0] = storage[0] ^ 1
        return made

    monkeypatch.setattr(Entry, "run", run)


def assert_same(got: list[Any], plain: list[Any]) -> None:
    assert [name for name, _ in got] == [name for name, _ in plain]
    wrong = [name for (name, a), (_, b) in zip(got, plain, strict=True) if not same(a, b)]
    assert not wrong, f"not as in plain training: {wrong}"


def attempt(build: Callable[[], World], budget: int | float, steps: int) -> tuple[list[Any], Stats, list[str]]:
    """Observations, statistics and autoremat's warnings of a training under a budget."""
    world = seeded(build)
    call = autoremat.checkpoint(world.target, budget=budget, time_limit_seconds=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = observe(world, call, steps)
    return got, autoremat.stats(call), [str(w.message) for w in caught if "autoremat" in str(w.message)]


def at_the_floor(build: Callable[[], World], steps: int, known: int = 1) -> tuple[list[Any], Stats, list[str]]:
    """A training under the smallest budget that all its plans fit into, where one of them has this floor."""
    budget = known
    for _ in range(8):
        try:
            return attempt(build, budget, steps)
        except autoremat.InfeasibleBudget as error:  # of the first kind of call that needs more
            budget = max(budget + 1, error.floor_bytes)
    raise AssertionError("no floor")


def exact(
    build: Callable[[], World],
    *,
    steps: int = 2,
    reruns: bool = True,
    deviates: bool | None = False,
    unplanned: bool | None = False,
    differs: bool = False,
    waits: bool = False,
) -> Stats:
    """Assert that training is the same under the feasible ``FRACTIONS``, and at the floor; the last statistics.

    Args:
        build: makes a fresh world; called after seeding every generator.
        steps: steps to compare.
        reruns: operators must have run again, at the floor if nowhere else.
        deviates: some step leaves the recorded path; None: it may, or not.
        unplanned: the step cannot be planned; it must run plainly, with a warning; None: it may, or not.
        waits: several calls wait for one backward; it may be said that they do not fit into a budget for one.
        differs: the self-check of the first step finds something that must not run again, and warns.
    """
    world = seeded(build)
    plain = observe(world, world.target, steps)
    warn = None in (deviates, unplanned) or deviates or unplanned or differs
    floor = 1
    for budget in (*FRACTIONS, None):
        try:
            got, stats, messages = attempt(build, budget, steps) if budget else at_the_floor(build, steps, floor)
        except autoremat.InfeasibleBudget as error:
            floor = error.floor_bytes
            continue
        floor = stats.plan.floor_bytes if stats.plan else floor
        assert_same(got, plain)
        messages = [m for m in messages if not (waits and "wait for one backward" in m)]
        messages = [m for m in messages if "first backward has shown" not in m]  # the floor is that of the recording
        assert deviates is None or (stats.deviations > 0) <= deviates, messages
        assert unplanned is None or (stats.unplanned > 0) <= unplanned, messages
        assert (stats.differing > 0) <= differs, messages
        assert bool(messages) <= warn, messages
        if ENDS_EARLY and not warn and stats.reruns > 0:
            break
    assert not unplanned or stats.unplanned > 0
    assert not deviates or stats.deviations > 0
    assert not differs or stats.differing > 0
    assert not warn or messages or None in (deviates, unplanned)
    if reruns and unplanned is False:
        assert stats.reruns > 0, "nothing ran again: the attack did not test anything"
    return stats


def plan_that_keeps_nothing(program: Program) -> Plan:
    """Whatever may be computed again is, and what was computed again once more at the next demand."""
    planned = planned_as(program)
    everything = frozenset(range(len(planned.values)))
    order = unroll(planned, frozenset(), drop_again=(everything,))
    schedule = unfolded(program, Schedule.from_order(planned, order))
    peak, plain_peak = simulate(program, schedule).peak_bytes, simulate(program).peak_bytes
    return Plan(program, schedule, peak, peak, plain_peak, peak, 0.0, 0.0, "keep nothing")
