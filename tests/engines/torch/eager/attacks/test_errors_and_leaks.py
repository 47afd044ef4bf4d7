"""Attacks with errors in the middle of a step, and with steps that nobody ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import autoremat
from autoremat.engines.torch.eager.tape import Tape
from tests.engines.torch.compare import World, exact, quick, seeded
from tests.engines.torch.eager.attacks.networks import (
    Net,
    curly,
    data,
    net,
    nothing_active,
    tensors_alive,
    tight,
    training,
)

__all__ = ["quick"]  # a fixture


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False])
def test_error_in_forward_leaves_nothing_behind(error: type[BaseException], first: bool) -> None:
    def build() -> World:
        bad: list[bool] = []

        def body(i: int, h: Tensor) -> Tensor:
            if i == 3 and bad:
                raise error("boom")
            return curly(i, h)

        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            for failing in (True, False) if first else (False, True, False):
                model.zero_grad()
                bad[:] = [True] * failing
                if failing:
                    with pytest.raises(error, match="boom"):
                        call(x)
                    assert nothing_active()
                else:
                    loss = call(x).square().mean()
                    loss.backward()
            return loss

        return World(model, step)

    stats = exact(build)
    assert stats.reruns > 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_in_backward_leaves_nothing_behind(error: type[BaseException]) -> None:
    def build() -> World:
        bad: list[bool] = []

        def boom(g: Tensor) -> Tensor:
            if bad:
                raise error("boom")
            return g

        def body(i: int, h: Tensor) -> Tensor:
            if i == 2:
                h = h * 1
                h.register_hook(boom)
            return curly(i, h)

        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            for failing in (False, True, False):
                model.zero_grad()
                bad[:] = [True] * failing
                loss = call(x).square().mean()
                if failing:
                    with pytest.raises(error, match="boom"):
                        loss.backward()
                    assert nothing_active()
                else:
                    loss.backward()
            return loss

        return World(model, step)

    exact(build)


def test_early_exit_by_exception_carries_a_usable_graph() -> None:
    class Exit(Exception):
        pass

    def build() -> World:
        early: list[bool] = []

        def body(i: int, h: Tensor) -> Tensor:
            if i == 3 and early:
                raise Exit(h.square().mean())
            return curly(i, h)

        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            model.zero_grad()
            early.clear()
            call(x).square().mean().backward()
            model.zero_grad()
            early.append(True)
            try:
                call(x)
            except Exit as exit:
                loss = exit.args[0]
            loss.backward()
            return loss

        return World(model, step)

    exact(build, deviates=True)


def test_abandoned_forward_is_freed_without_the_garbage_collector() -> None:
    made: list[weakref.ref[Any]] = []

    def body(i: int, h: Tensor) -> Tensor:
        y = h.exp()
        made.append(weakref.ref(y.untyped_storage()))
        return y.sin() * h.cos()

    world, call = tight(lambda: training(Net(body)))
    world.target.zero_grad()
    made.clear()
    gc.collect()
    gc.disable()
    try:
        tapes_before = sum(type(o) is Tape for o in gc.get_objects())
        y = call(data())
        assert len(made) == 5
        del y
        assert not any(ref() for ref in made)
        assert sum(type(o) is Tape for o in gc.get_objects()) == tapes_before
        call(data()).mean().backward()
        assert not any(ref() for ref in made)
        assert sum(type(o) is Tape for o in gc.get_objects()) == tapes_before
    finally:
        gc.enable()


@pytest.mark.slow
def test_number_of_tensors_stays_level_over_300_steps() -> None:
    world, call = tight(lambda: training(Net(lambda i, h: F.dropout(h, 0.1).exp().sin(), 3)))
    counts = []
    for k in range(300):
        world.step(call)
        if k % 100 == 99:
            gc.collect()
            counts.append(tensors_alive())
    assert counts[0] == counts[1] == counts[2]


def test_planning_leaves_no_tensors_behind() -> None:
    world = seeded(lambda: training(net()))
    world.step(world.target)
    autoremat.plan(net(), data(), budget=0.9, time_limit_seconds=0.1)
    gc.collect()
    before = tensors_alive()
    autoremat.plan(net(), data(), budget=0.9, time_limit_seconds=0.1)
    gc.collect()
    assert tensors_alive() == before
