"""Attacks from outside torch: other threads and processes, interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoremat
from tests.engines.torch.compare import World, exact, quick
from tests.engines.torch.eager.attacks.networks import (
    ROWS,
    Net,
    check_body,
    check_step,
    curly,
    data,
    net,
    nothing_active,
    tight,
    training,
)

__all__ = ["quick"]  # a fixture

# ---- threads and processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
def test_backwards_of_several_threads_through_one_graph() -> None:
    def step(call: Any, x: Tensor) -> Any:
        weights = [layer.weight for layer in call.layers]
        loss = call(x).square().mean()
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda _: torch.autograd.grad(loss, weights, retain_graph=True), range(12)))

    for _ in range(2):
        check_step(step)


def test_half_of_the_graph_in_every_thread() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(net(3) for _ in range(4))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head(x) for head in self.heads]

    def step(call: Any, x: Tensor) -> None:
        losses = [y.square().mean() for y in call(x)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(Tensor.backward, losses))

    check_step(step, Heads)


def test_threads_inside_the_forward() -> None:
    """What they compute is not seen, so it is kept."""

    def body(i: int, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            a, b = pool.map(lambda s: (h * s).exp().sin(), (0.5, 0.25))
        return (a * b).cos() * h.sin()

    check_body(body)


def test_threads_inside_the_forward_without_gradients() -> None:
    def body(i: int, h: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            a = pool.submit(lambda t: (t * 0.5).exp().sin(), h.detach()).result()
        return (a * h).cos() * h.sin()

    check_body(body)


def run(script: str) -> str:
    """Run a script in a process of its own, warnings being errors there, too."""
    done = subprocess.run(
        # The warning is about the machine: fewer processors than workers.
        [sys.executable, "-W", "error", "-W", "ignore:This DataLoader", "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[5],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
    import os, torch, autoremat
    from torch import nn
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2))])
    class Data(torch.utils.data.Dataset):
        def __len__(self): return 64
        def __getitem__(self, i): return torch.full((16,), i / 64)
    def train(call, model, batches):
        torch.manual_seed(1)
        out = []
        for x in batches:
            model.zero_grad()
            call(x.repeat(32, 1)).square().mean().backward()
            out += [p.grad.clone() for p in model.parameters()]
        return out
    plain, model = make(), make()
    batches = [torch.rand(8, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    autoremat.checkpoint(model, budget=0.75, time_limit_seconds=0.2)
    def same():
        a, b = train(plain, plain, batches), train(model, model, batches)
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and autoremat.stats(model).reruns > 0
"""


@pytest.mark.slow
@pytest.mark.guard
def test_fork_after_use_and_data_loader_workers_beside() -> None:
    script = """
    assert same()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if same() else 2
            finally:
                os._exit(code)
        children.append(pid)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    def loader():
        torch.manual_seed(3)
        return torch.utils.data.DataLoader(Data(), batch_size=8, num_workers=2, shuffle=True)
    a, b = train(plain, plain, loader()), train(model, model, loader())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert same()
    print("all the same")
    """
    assert "all the same" in run(PRELUDE + script)


# ---- interrupts ------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.one_in(2, guard=True)
@pytest.mark.parametrize("where", ["recording", "forward", "backward", "planning"])
def test_ctrl_c(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing behind, and the next step is exact."""
    due: list[str] = []

    class Interrupts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if due and due[0] == ("forward" if type(x) is Tensor else "recording"):
                due.clear()
                interrupt()
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            if due and due[0] == "backward" and type(g) is Tensor:
                due.clear()
                interrupt()
            return g * 1

    def body(i: int, h: Tensor) -> Tensor:
        return curly(i, Interrupts.apply(h) if i == 2 else h)

    solve = autoremat.engines.torch.eager.options.solve

    def interrupted_solve(*args: Any, **kwargs: Any) -> Any:
        if due and due[0] == "planning":
            due.clear()
            interrupt()
        return solve(*args, **kwargs)

    monkeypatch.setattr(autoremat.engines.torch.eager.options, "solve", interrupted_solve)

    def build() -> World:
        model, x = Net(body), data()

        def step(call: Any) -> Tensor:
            for failing in (True, False, True, False):
                model.zero_grad()
                fresh = torch.cat([x] * (2 if failing else 1))[: ROWS + failing]
                due[:] = [where] * failing
                state = torch.get_rng_state()
                try:
                    call(fresh).square().mean().backward()
                except KeyboardInterrupt:
                    assert nothing_active()
                    torch.set_rng_state(state)
                due.clear()
            return call(x)

        return World(model, step)

    exact(build)


def test_abandoned_in_every_way() -> None:
    """Forwards without a backward, half a backward, a graph kept for ever: the next steps do not mind."""
    kept: list[Tensor] = []

    def step(call: Any, x: Tensor) -> Tensor:
        call(x)
        kept.append(call(x * 2))
        y = call(x * 3)
        torch.autograd.grad(y.mean(), call.layers[4].weight)
        loss = call(x).square().mean()
        loss.backward()
        return loss

    check_step(step)


def test_nothing_is_left_of_a_step_whose_graph_is_gone() -> None:
    world, call = tight(lambda: training(Net(lambda i, h: F.dropout(h, 0.1).exp().sin())))
    for _ in range(3):
        world.step(call)
    assert nothing_active()
    assert all(type(p.grad) is Tensor for p in world.target.parameters())
