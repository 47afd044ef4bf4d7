"""What the tape does, event by event, as a table: calls made again, values that come and go, requests of the backward.

In a trace ``tanh0`` is a call that is made again; ``+tanh0`` what it makes comes to be held by the tape, ``-tanh0``
leaves; ``?tanh0`` the backward asks for it; ``|`` ends the forward; ``new`` is a value that the plan does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoremat.engines.torch.eager.calls import name_of
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.path import Path
from autoremat.planner import solve
from autoremat.program import Plan, Program
from tests.engines.torch.compare import plan_that_keeps_nothing
from tests.engines.torch.follow import following, recorded


class Trace:
    """Listens to one tape's ledger; tells values by the calls that make them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.names: dict[int, str] = {}
        hold, let_go, run = Ledger.hold, Ledger.let_go, Ledger.run

        def held(ledger: Ledger, value: int, tensor: Tensor) -> None:
            if value not in ledger.held:
                self.note("+", value)
            hold(ledger, value, tensor)

        def gone(ledger: Ledger, value: int) -> None:
            if value in ledger.held:
                self.note("-", value)
            let_go(ledger, value)

        def again(ledger: Ledger, call: int, *args: Any) -> None:
            self.events.append(self.calls[call])
            run(ledger, call, *args)

        monkeypatch.setattr(Ledger, "hold", held)
        monkeypatch.setattr(Ledger, "let_go", gone)
        monkeypatch.setattr(Ledger, "run", again)

    def note(self, sign: str, value: int) -> None:
        """Something has happened to a value."""
        self.events.append(sign + self.names.get(value, "new"))

    def know(self, path: Path) -> None:
        """Names of calls and values, from here on."""
        counts: dict[str, int] = {}
        self.calls = []
        for call in path.calls:
            name = name_of(call.func).strip("_")
            self.calls.append(f"{name}{counts.setdefault(name, 0)}")
            counts[name] += 1
            for _, value in (*call.results, *call.saved):
                self.names.setdefault(value, self.calls[-1])
            for _, _, value in call.written:
                self.names[value] = self.calls[-1]


def layers(x: Tensor) -> Tensor:
    """Three of two functions and a product."""
    for _ in range(3):
        x = torch.tanh(x).mul(torch.sin(x))
    return x.sum()


def in_place(x: Tensor) -> Tensor:
    """An overwriting function, after one that saves nothing of what is overwritten."""
    return torch.sin(torch.cos(x).add(1).mul_(2)).sum()


class Norm(nn.Module):
    """Batch norm between two functions: its statistics change once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        return torch.sin(self.norm(torch.tanh(x))).sum()


def everything(program: Program) -> Plan:
    """The plan that keeps all."""
    return solve(program, 1.0)


def tight(program: Program) -> Plan:
    """The plan with the lowest peak that is known."""
    return solve(program, solve(program, 1.0).floor_bytes)


def once(loss: Tensor) -> None:
    """An ordinary pass."""
    loss.backward()


def twice(loss: Tensor) -> None:
    """Two passes through one graph."""
    loss.backward(retain_graph=True)
    loss.backward()


def with_graph(loss: Tensor) -> None:
    """A pass that builds a graph of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the circle that this makes
        loss.backward(create_graph=True)


def left(x: Tensor) -> Tensor:
    """As ``layers``, but for the last call but one."""
    for k in range(3):
        x = torch.tanh(x).mul(torch.sin(x) if k < 2 else torch.cos(x))
    return x.sum()


TRACES: dict[str, tuple[Callable[..., Tensor], Callable[[Program], Plan], Callable[[Tensor], None], Any, str]] = {
    "everything kept": (
        layers,
        everything,
        once,
        None,
        "|",
    ),
    "nothing kept": (
        layers,
        plan_that_keeps_nothing,
        once,
        None,
        "| ?sin2 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 tanh1 +tanh1 sin1 +sin1 -mul0 mul1 +mul1 "
        "-tanh1 -sin1 sin2 +sin2 -mul1 -sin2 ?tanh2 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 tanh1 +tanh1 sin1 "
        "+sin1 mul1 +mul1 tanh2 +tanh2 -tanh2 ?mul1 ?tanh2 tanh2 +tanh2 -mul1 -tanh2 ?sin1 -sin1 ?tanh1 ?mul0 "
        "-mul0 ?tanh1 -tanh1 ?sin0 -sin0 ?tanh0 ?tanh0 -tanh0",
    ),
    "the lowest peak": (
        layers,
        tight,
        once,
        None,
        "+mul1 | ?tanh2 tanh2 +tanh2 -mul1 -tanh2 ?sin1 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 sin1 "
        "+sin1 -sin1 ?tanh1 tanh1 +tanh1 -mul0 -tanh1 ?mul0 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 "
        "?tanh1 tanh1 +tanh1 -mul0 -tanh1 ?sin0 sin0 +sin0 -sin0 ?tanh0 tanh0 +tanh0 ?tanh0 -tanh0",
    ),
    "two passes": (
        layers,
        tight,
        twice,
        None,
        "+mul1 | ?tanh2 tanh2 +tanh2 -tanh2 ?sin1 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 sin1 +sin1 "
        "-sin1 ?tanh1 tanh1 +tanh1 -mul0 -tanh1 ?mul0 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 ?tanh1 "
        "tanh1 +tanh1 -mul0 -tanh1 ?sin0 sin0 +sin0 -sin0 ?tanh0 tanh0 +tanh0 ?tanh0 -tanh0 ?tanh2 tanh2 "
        "+tanh2 -mul1 -tanh2 ?sin1 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 sin1 +sin1 -sin1 ?tanh1 "
        "tanh1 +tanh1 -mul0 -tanh1 ?mul0 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 ?tanh1 tanh1 +tanh1 "
        "-mul0 -tanh1 ?sin0 sin0 +sin0 -sin0 ?tanh0 tanh0 +tanh0 ?tanh0 -tanh0",
    ),
    "a graph of the pass": (
        layers,
        tight,
        with_graph,
        None,
        "+mul1 | ?tanh2 tanh2 +tanh2 -tanh2 ?sin1 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 sin1 +sin1 "
        "-sin1 ?tanh1 tanh1 +tanh1 -mul0 -tanh1 ?mul0 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 ?tanh1 "
        "tanh1 +tanh1 -mul0 -tanh1 ?sin0 sin0 +sin0 -sin0 ?tanh0 tanh0 +tanh0 ?tanh0 -tanh0",
    ),
    "the path is left": (
        layers,
        tight,
        once,
        left,
        "+mul1 +new +tanh2 -tanh2 -new | ?new sin2 +new ?tanh2 tanh2 +tanh2 -new ?mul1 ?tanh2 -mul1 -tanh2 "
        "?sin1 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 sin1 +sin1 -tanh0 -sin0 -mul0 ?tanh1 tanh0 +tanh0 sin0 "
        "+sin0 mul0 +mul0 -tanh0 -sin0 tanh1 +tanh1 -mul0 -sin1 ?mul0 tanh0 +tanh0 sin0 +sin0 -tanh1 mul0 "
        "+mul0 -tanh0 -sin0 -mul0 ?tanh1 tanh0 +tanh0 sin0 +sin0 mul0 +mul0 -tanh0 -sin0 tanh1 +tanh1 -mul0 "
        "-tanh1 ?sin0 sin0 +sin0 ?tanh0 tanh0 +tanh0 -sin0 ?tanh0 -tanh0",
    ),
    "in place": (
        in_place,
        plan_that_keeps_nothing,
        once,
        None,
        "| ?mul0 cos0 +cos0 add0 +add0 -cos0 mul0 -add0 +mul0 -mul0",
    ),
    "batch norm": (
        Norm(),
        plan_that_keeps_nothing,
        once,
        None,
        "| ?batch_norm0 tanh0 +tanh0 batch_norm0 +batch_norm0 -tanh0 -batch_norm0 ?tanh0 tanh0 +tanh0 "
        "?batch_norm0 batch_norm0 +batch_norm0 +batch_norm0 -batch_norm0 ?batch_norm0 -batch_norm0 ?tanh0 "
        "-tanh0",
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_what_the_tape_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, plan_of, go, other, expected = TRACES[name]
    x = torch.linspace(-1, 1, 8).reshape(4, 2).requires_grad_()
    program, path = recorded(fn, (x,))
    trace = Trace(monkeypatch)
    trace.know(path)
    tape = following(plan_of(program), path)
    tape.backward.watch = SimpleNamespace(asked=lambda value: trace.note("?", value), gone=lambda pack: None)
    with tape.forward():
        loss = (other or fn)(x)
    trace.events.append("|")
    go(loss)
    assert " ".join(trace.events) == expected
