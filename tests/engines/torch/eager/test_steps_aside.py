"""TorchScript, tracing, exporting; training inside of the callable; jagged nested tensors."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import autoremat
from autoremat.engines.torch.eager.dry_run import record
from autoremat.engines.torch.world import apart
from autoremat.engines.torch.world.apart import can_run_apart
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.engines.torch.world.problems import UnusableInput
from tests.alone import goes_on_alone
from tests.engines.torch.eager.scripted import Act, scripted


@pytest.fixture(params=["apart", "here"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "here":
        monkeypatch.setattr(apart._Here, "cannot", True)
    return str(request.param)


# ---- TorchScript -----------------------------------------------------------------------------------------------------


@pytest.fixture
def deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        warnings.filterwarnings("ignore", message=".*TracerWarning.*")
        yield


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.usefixtures("deprecated")
def test_scripted_parts_keep_their_parameters_and_train_as_plainly(way: str, request: pytest.FixtureRequest) -> None:
    if goes_on_alone(request, needed=way == "apart" and not can_run_apart()):  # a compiler's threads are there
        return
    net, x = scripted(), torch.randn(256, 32)
    parameters = {n: p.data_ptr() for n, p in net.named_parameters()}
    refused = pytest.raises(UnusableInput, match="ScriptModule") if way == "here" else nullcontext()
    with refused:
        autoremat.plan(net, x, budget=1.0, time_limit_seconds=0.2)
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == parameters
    step = autoremat.checkpoint(lambda x: net(x).square().mean(), budget=0.85, time_limit_seconds=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = step(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert not [w for w in caught if "autoremat" in str(w.message)]
    assert losses == sorted(losses, reverse=True)
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == parameters
    stats = autoremat.stats(step)
    assert stats.unplanned == 0
    assert stats.reruns > 0


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.usefixtures("deprecated")
@pytest.mark.parametrize("is_optimized", [False, True])
def test_all_that_scripted_parts_save_is_in_the_plan(is_optimized: bool) -> None:
    net, x = scripted(), torch.randn(1024, 32)
    fn = lambda x: net(x).square().mean()  # noqa: E731

    def peak(call: Callable[[Tensor], Tensor]) -> int:
        net.zero_grad()
        return account(lambda: call(x).backward(), resident(net, x)).peak_bytes

    plain_peak = max(peak(fn) for _ in range(3 if is_optimized else 1))
    budget = int(0.8 * plain_peak)
    step = autoremat.checkpoint(fn, budget=budget, time_limit_seconds=0.5)
    measured = [peak(step) for _ in range(3)]
    plan = autoremat.stats(step).plan
    assert plan is not None
    assert plan.plain_peak_bytes == pytest.approx(plain_peak, rel=0.01)
    assert max(measured) == pytest.approx(plan.peak_bytes, rel=0.01)
    assert max(measured) <= budget


@pytest.mark.usefixtures("deprecated")
def test_what_scripted_parts_save_cannot_go() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[torch.jit.script(Act()) for _ in range(4)], nn.Linear(32, 8))
    x = torch.randn(1024, 32)
    plain_peak = account(lambda: net(x).sum().backward(), resident(net, x)).peak_bytes
    step = autoremat.checkpoint(lambda x: net(x).sum(), budget=int(0.7 * plain_peak), time_limit_seconds=0.5)
    with pytest.raises(autoremat.InfeasibleBudget) as refused:
        step(x)
    assert refused.value.floor_bytes > 0.8 * plain_peak


SCRIPTED = """
import hashlib, sys, warnings
warnings.simplefilter("ignore")
import torch, autoremat
from tests.engines.torch.eager.scripted import scripted
torch.set_num_threads(1)
net = scripted(); x = torch.randn(256, 32)
step = lambda x: net(x).square().mean()
if sys.argv[1] == "checkpointed":
    step = autoremat.checkpoint(step, budget=0.85, time_limit_seconds=0.5)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for _ in range(4):
    optimizer.zero_grad(); loss = step(x); loss.backward(); optimizer.step()
digest = hashlib.sha256(loss.detach().numpy().tobytes())
for p in net.parameters():
    digest.update(p.detach().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.guard
def test_scripted_parts_are_exact() -> None:
    """In processes of their own: TorchScript computes otherwise once it has optimized a function."""
    root = Path(__file__).parents[4]
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPTED, kind], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for kind in ("plain", "checkpointed")
    }
    assert len(digests) == 1


def wrapped() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.GELU())])
    plain, x = copy.deepcopy(net), torch.randn(64, 16)
    autoremat.checkpoint(net, budget=0.9, time_limit_seconds=0.2)(x).sum().backward()
    return net, plain, x


def traced(m: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.trace(m, x)(x)


def compiled_by_script(m: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.script(m)(x)


def inside_of_a_scripted_one(m: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.script(nn.Sequential(m, nn.Identity()))(x)


def symbolically_traced(m: nn.Module, x: Tensor) -> Tensor:
    return torch.fx.symbolic_trace(m)(x)


def exported(m: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(m, (x,)).module()(x)


def pickled(m: nn.Module, x: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)(x)


@pytest.mark.usefixtures("deprecated")
@pytest.mark.parametrize(
    "tool", [traced, compiled_by_script, inside_of_a_scripted_one, symbolically_traced, exported, pickled]
)
def test_tools_work_as_on_the_plain_module(tool: Callable[[nn.Module, Tensor], Tensor]) -> None:
    net, plain, x = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(tool(net, x), tool(plain, x))
    net.zero_grad()
    plain.zero_grad()
    net(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), plain.parameters(), strict=True))  # type: ignore[arg-type]


# ---- training inside of the callable ---------------------------------------------------------------------------------


@pytest.mark.one_in(5)
@pytest.mark.parametrize("returns", ["loss", "item", "detached"])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_whole_training_step_is_refused_and_nothing_harmed(way: str, returns: str, with_optimizer: bool) -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1)), torch.randn(16, 8)
    optimizer = torch.optim.Adam(net.parameters())
    net(x).sum().backward()
    before = [(p.detach().clone(), p.grad) for p in net.parameters()]

    def train(x: Tensor) -> Any:
        if with_optimizer:
            optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        if with_optimizer:
            optimizer.step()
        return {"loss": loss, "item": loss.detach(), "detached": loss.detach()}[returns]

    for call in (autoremat.checkpoint(train, budget=0.7), lambda x: autoremat.plan(train, x, budget=0.7)):
        with pytest.raises(ValueError, match=r"backward.* outside"):
            call(x)
    assert not optimizer.state
    for p, (value, gradient) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is gradient
        assert not isinstance(p.grad, FakeTensor)


# ---- jagged nested tensors -------------------------------------------------------------------------------------------


def test_jagged_nested_tensors_are_planned_and_exact(way: str) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.LayerNorm(16))]
    net, offsets = nn.Sequential(*layers), torch.tensor([0, 10, 40, 64])

    def step(values: Tensor, offsets: Tensor) -> Tensor:
        return net(torch.nested.nested_tensor_from_jagged(values, offsets)).values().square().mean()

    def gradients(fn: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
        net.zero_grad()
        loss = fn(x, offsets)
        loss.backward()
        return [loss.detach(), *[p.grad.clone() for p in net.parameters() if p.grad is not None]]

    checkpointed = autoremat.checkpoint(step, budget=0.8, time_limit_seconds=1)
    for _ in range(3):
        x = torch.randn(64, 16)
        assert all(map(torch.equal, gradients(checkpointed, x), gradients(step, x)))
    stats = autoremat.stats(checkpointed)
    assert stats.reruns
    assert not stats.unplanned
    assert not stats.deviations


def test_jagged_arguments_of_other_lengths_are_one_kind() -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def step(nested: Tensor) -> Tensor:
        return net(nested).values().square().mean()

    checkpointed = autoremat.checkpoint(step, budget=1.0, time_limit_seconds=0.2)
    for middle in (10, 20, 30):
        net.zero_grad()
        offsets = torch.tensor([0, middle, 64])
        values = torch.randn(64, 16)
        loss = checkpointed(torch.nested.nested_tensor_from_jagged(values, offsets))
        loss.backward()
        plain = step(torch.nested.nested_tensor_from_jagged(values, offsets))
        assert torch.equal(loss, plain)
    assert autoremat.stats(checkpointed).plans <= 2  # with gradients and without
    assert not autoremat.stats(checkpointed).unplanned


def test_nested_tensors_of_the_old_layout_are_named_as_what_they_are() -> None:
    weight = torch.randn(8, 8, requires_grad=True)

    def step(a: Tensor, b: Tensor) -> Tensor:
        nested = torch.nested.as_nested_tensor([a @ weight, b @ weight])
        return torch.nested.to_padded_tensor(nested.relu(), 0.0).sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        program = record(step, (torch.randn(3, 8), torch.randn(5, 8)), timing="estimate")
    assert any("nested" in op.why for op in program.ops)


# ---- parts without modes, and without memory -------------------------------------------------------------------------


def frozen_teacher(x: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """A scripted module that was frozen says nothing of a mode any more."""
    teacher = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).eval()))
    target = teacher(x).detach()
    return lambda model, x: (model(x) - teacher(x).detach() - target).square().sum()


def ensemble(x: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
    """The recipe of torch.func: a skeleton on meta, and the stacked weights of its members."""
    members = [nn.Linear(8, 4) for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    skeleton = copy.deepcopy(members[0]).to("meta")

    def member(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(skeleton, (weights, buffers), (x,))

    return lambda model, x: torch.func.vmap(member, (0, 0, None))(weights, buffers, model(x)).square().sum()


@pytest.mark.usefixtures("deprecated")
@pytest.mark.parametrize("part", [frozen_teacher, ensemble])
def test_parts_without_a_mode_or_memory_are_trained_beside(part: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    loss_of, plain = part(x), nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(8, 8), nn.Tanh())])
    mine = copy.deepcopy(plain)
    step = autoremat.checkpoint(lambda x: loss_of(mine, x), budget=0.95)
    for _ in range(3):
        for model, loss in ((plain, lambda x: loss_of(plain, x)), (mine, step)):
            model.zero_grad()
            loss(x).backward()
        for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert autoremat.stats(step).unplanned == 0
