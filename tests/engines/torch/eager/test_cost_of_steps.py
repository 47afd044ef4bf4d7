"""What a step under a plan does per group of reruns and per handle, counted."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.eager import kinds
from autoremat.engines.torch.eager.kinds import Kind, Prepared, Steadiness
from autoremat.engines.torch.eager.paying import lost_seconds, shares_of_interest
from autoremat.engines.torch.eager.scripts import script_of
from autoremat.engines.torch.eager.state import DRAWING, Rerunning, State
from autoremat.engines.torch.eager.tape import Tape
from autoremat.engines.torch.operators.settings import state_of
from autoremat.program import InfeasibleBudget, Plan
from tests.engines.torch.follow import recorded, reruns_of


def test_a_block_puts_every_generator_back_once() -> None:
    own, before = torch.Generator(), torch.default_generator.get_state()
    states = {g: state_of(g) for g in (torch.default_generator, own)}
    torch.rand(3)
    now = torch.default_generator.get_state()
    with Rerunning() as rerunning:
        for generator, state in (*states.items(), *states.items()):
            rerunning.draw(generator, state)
            with rerunning.use(State.now()):
                torch.rand(2, generator=generator)
        other = threading.Thread(target=lambda: free.append(DRAWING.acquire(blocking=False)))
        free: list[bool] = []
        other.start()
        other.join()
    assert free == [False]  # nobody else draws meanwhile
    assert torch.equal(torch.default_generator.get_state(), now)
    assert state_of(own) == states[own]
    assert DRAWING.acquire(blocking=False)
    DRAWING.release()
    torch.default_generator.set_state(before)


def test_an_error_inside_the_block_puts_them_back_too() -> None:
    state, now = state_of(torch.default_generator), torch.default_generator.get_state()

    def fails() -> None:
        with Rerunning() as rerunning:
            rerunning.draw(torch.default_generator, state)
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(torch.default_generator.get_state(), now)
    free: list[bool] = []
    other = threading.Thread(target=lambda: free.append(DRAWING.acquire(blocking=False) and not DRAWING.release()))
    other.start()
    other.join()
    assert free == [True]


def stack() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A loss of some layers, and an input."""
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.Tanh())))
    return lambda x: model(x).square().mean(), torch.randn(512, 16)


def smallest(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Plan, Any]:
    """The plan of a step at its floor, and the step's path."""
    program, path = recorded(loss, (x,))
    with pytest.raises(InfeasibleBudget) as error:
        autoremat.solve(program, 1)
    return autoremat.solve(program, error.value.floor_bytes), path


def calls_of(run: Callable[[], Any]) -> int:
    """How many Python functions are called. It is the same on every machine."""
    count = 0

    def counted(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    gc.disable()
    sys.setprofile(counted)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


@pytest.mark.slow
def test_a_rerun_calls_few_python_functions() -> None:
    loss, x = stack()
    plan, path = smallest(loss, x)
    script = script_of(plan, path)

    def step() -> None:
        with Tape(script).forward():
            out = loss(x)
        backward.append(calls_of(out.backward))

    backward: list[int] = []
    for _ in range(3):
        step()
    n_handles = sum(value is not None for value in script.packs)
    plain = calls_of(loss(x).backward)
    assert reruns_of(script) >= 6
    assert backward[-1] - plain <= 40 * reruns_of(script) + 25 * n_handles


@pytest.mark.slow
def test_once_the_backward_is_over_nothing_is_held() -> None:
    loss, x = stack()
    plan, path = smallest(loss, x)
    tape = Tape(script_of(plan, path))
    with tape.forward():
        out = loss(x)
    is_alive = tape.life()
    assert is_alive()
    out.backward()
    assert not is_alive()
    assert not tape.ledger.held
    assert not tape.ledger.entries


def test_spare_is_weighed_against_what_forwards_really_take(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, x = stack()
    program, path = recorded(loss, (x,))
    kind = Kind(Prepared(path=path, steadiness=Steadiness(steps=100)))
    kind.prepared.follow(autoremat.solve(program, 1.0), 1 << 20, tried_seconds=0.0)
    monkeypatch.setattr(kinds, "_MATTERS", 0.0)
    monkeypatch.setattr(kinds, "_CHEAP", 1e9)  # by the estimate of the program, spare costs nothing
    assert kind.is_wary
    kind.forward_took(1e-15)
    assert not kind.is_wary


@pytest.mark.slow
def test_less_is_lost_the_more_an_input_would_need_itself() -> None:
    loss, x = stack()
    plan, path = smallest(loss, x)
    script = script_of(plan, path)
    at_once, half_way = shares_of_interest(plan)
    assert 0 < at_once < half_way < 1
    assert lost_seconds(plan, script, 1.0) == 0 < lost_seconds(plan, script, half_way)
    assert lost_seconds(None, None, 0.5) == 0
    assert shares_of_interest(None) == ()
