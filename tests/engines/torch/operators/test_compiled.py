"""``torch.compile`` beside autoremat: compiled code inside what is checkpointed, around it, and next to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoremat
from autoremat.engines.torch.operators.compiled import CompiledCode, eagerly, in_compiled_code
from tests.engines.torch.compare import World, assert_same, attempt, exact, observe, quick, seeded

__all__ = ["quick"]  # a fixture

pytestmark = [
    # The compiler imports what torch calls deprecated, and looks at the gradient of every tensor.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
LAYERS, WIDTH, ROWS = 4, 32, 64


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    """Every test compiles for itself."""
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    def layer() -> nn.Sequential:
        return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * WIDTH, WIDTH))

    return nn.Sequential(*[layer() for _ in range(LAYERS)])


def pointwise(h: Tensor) -> Tensor:
    return (h.sin() * h).square().sum()


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance  # type: ignore[no-any-return]


def step(call: Any) -> Tensor:
    result = call(torch.randn(ROWS, WIDTH)).square().mean()
    result.backward()
    return result


def submodule(backend: str) -> World:
    model = network()
    model[2] = torch.compile(model[2], backend=backend)
    return World(model, step)


def submodule_in_place(backend: str) -> World:
    model = network()
    model[2].compile(backend=backend)
    return World(model, step)


def loss(backend: str) -> World:
    model, compiled = network(), torch.compile(pointwise, backend=backend)
    return World(lambda x: compiled(model(x)), step, (model,))


@pytest.mark.parametrize(
    ("backend", "build"),
    [
        ("eager", loss),
        pytest.param("aot_eager", submodule, marks=pytest.mark.slow),
        pytest.param("aot_eager", submodule_in_place, marks=pytest.mark.slow),
        pytest.param("aot_eager", loss, marks=pytest.mark.slow),
        pytest.param("inductor", submodule, marks=pytest.mark.slow),
        pytest.param("inductor", loss, marks=pytest.mark.slow),
    ],
)
def test_compiled_code_inside_runs_compiled_and_without_checkpointing(backend: str, build: Any) -> None:
    """What the compiler makes of it has other last bits than the operators: so it stays compiled."""
    exact(lambda: build(backend), unplanned=True)
    _, _, messages = attempt(lambda: build(backend), 0.6, 1)
    assert "leave torch.compile out there, or checkpoint only what is not compiled" in messages[0]
    assert "test_compiled.py:" in messages[0]
    assert stance() == "default"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_was_compiled_before_the_first_call_stays_compiled(backend: str) -> None:
    """Convolutions work in place on what an operator made, unseen, once they are compiled."""

    def build() -> World:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        compiled = torch.compile(model, backend=backend)
        model.train()
        compiled(torch.randn(2, 3, 16, 16)).sum().backward()
        model.zero_grad()

        def work(x: Tensor) -> Tensor:
            return compiled(x.sin()).sigmoid().mean()

        def step(call: Any) -> Tensor:
            result: Tensor = call(torch.randn(2, 3, 16, 16))
            result.backward()
            return result

        return World(work, step, (model,))

    exact(build, unplanned=True)


def test_planning_refuses_compiled_code() -> None:
    world = loss("eager")
    with pytest.raises(CompiledCode, match=r"test_compiled\.py:\d+\) is compiled by torch\.compile.*leave"):
        autoremat.plan(world.target, torch.randn(ROWS, WIDTH), budget=0.6)
    assert stance() == "default"


@pytest.mark.parametrize("fullgraph", [pytest.param(False, marks=pytest.mark.slow), True])
def test_checkpointed_module_inside_code_of_a_compiler_that_splits_no_graph(fullgraph: bool) -> None:
    """Where it does, the graph is planned: tests/engines/torch/compiled."""

    def build(wrap: Any) -> World:
        model = wrap(network())
        return World(
            torch.compile(lambda x: model(1.5 * x).sin(), backend="eager", fullgraph=fullgraph), step, (model,)
        )

    world = seeded(lambda: build(lambda m: m))
    plain = observe(world, world.target, 2)
    torch._dynamo.reset()
    world = seeded(lambda: build(lambda m: autoremat.checkpoint(m, budget=0.6)))
    with pytest.warns(RuntimeWarning, match=r"inside torch\.compile: running without.*from code that is not compiled"):
        got = observe(world, world.target, 2)
    assert_same(got, plain)
    stats = autoremat.stats(world.modules[0])
    assert (stats.unplanned, stats.calls) == (2, 0)


@pytest.mark.slow
def test_checkpointed_module_inside_code_that_the_compiler_gave_up() -> None:
    """After a graph break in the frame that calls the module, it is one graph nevertheless, and planned."""

    def build(wrap: Any) -> World:
        model = wrap(network())

        def work(x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            y = model(x)
            torch._dynamo.graph_break()
            return y.sin()  # type: ignore[no-any-return]

        return World(torch.compile(work, backend="aot_eager"), step, (model,))

    world = seeded(lambda: build(lambda m: m))
    plain = observe(world, world.target, 2)
    torch._dynamo.reset()
    world = seeded(lambda: build(lambda m: autoremat.checkpoint(m, budget=0.9)))
    assert_same(observe(world, world.target, 2), plain)
    stats = autoremat.stats(world.modules[0])
    assert stats.plan is not None
    assert (stats.executed_by, stats.planned, stats.fallbacks) == ("aot_eager", 1, 0)


@pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.slow) for b in ("eager", "aot_eager", "inductor")],
)
def test_compiled_loss_beside_the_checkpointed_module(backend: str) -> None:
    compiled = torch.compile(pointwise, backend=backend)

    def step(call: Any) -> Tensor:
        result: Tensor = compiled(call(torch.randn(ROWS, WIDTH)))
        result.backward()
        return result

    exact(lambda: World(network(), step))


def test_a_module_compiled_after_the_first_step_is_noticed() -> None:
    model = autoremat.checkpoint(network(), budget=0.7)
    step(model)
    assert autoremat.stats(model).plans == 1
    model[1].compile(backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="leave torch.compile out there"):
        step(model)
    assert autoremat.stats(model).unplanned == 1


@pytest.mark.slow
def test_a_branch_with_compiled_code_off_the_recorded_path() -> None:
    """It runs eagerly in that step, which says so; the next one is recorded anew and finds it."""
    compiled = torch.compile(lambda h: h.exp().sin() * h.cos(), backend="eager")

    def build() -> World:
        model, calls = network(), iter(range(100))

        def work(x: Tensor) -> Tensor:
            h = model[1](model[0](x))
            h = compiled(h) if x[0, 0] > 0 else h
            return model[3](model[2](h)).square().mean()  # type: ignore[no-any-return]

        def step(call: Any) -> Tensor:
            model.zero_grad()
            x = torch.rand(ROWS, WIDTH) - float(next(calls) == 0)
            result: Tensor = call(x)
            result.backward()
            return result

        return World(work, step, (model,))

    exact(build, steps=3, deviates=True, unplanned=True, reruns=False)
    _, _, messages = attempt(build, 0.7, 3)
    assert any("of compiled code, which runs eagerly here" in m for m in messages)
    assert any("leave torch.compile out there" in m for m in messages)


def test_the_compilers_switch_is_put_back() -> None:
    torch._dynamo.reset()  # imports the compiler
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with eagerly():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with eagerly():
        thread.start()
        assert entered.wait(60)
    assert stance() == "force_eager"
    leave.set()
    thread.join()
    assert stance() == "default"
    with pytest.raises(ZeroDivisionError), eagerly():
        _ = 1 / 0
    assert stance() == "default"


def test_torch_calls_compiled_code_as_we_think() -> None:
    found = []
    with eagerly():
        torch.compile(lambda: found.append(in_compiled_code()), backend="eager")()
    assert found == [True]
    assert not in_compiled_code()
