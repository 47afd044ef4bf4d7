"""What can be seen in one process: groups of one, and of two of which the other is made up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import autoremat
from autoremat.engines.torch.world.optimizer import optimizer_bytes
from autoremat.engines.torch.world.parallel import NotSupported
from autoremat.engines.torch.world.problems import UnusableInput
from autoremat.program import Once


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def beside_a_made_up_one() -> Iterator[None]:
    """A group of two whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.up(x)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(3)))


def sharded(model: nn.Sequential) -> nn.Module:
    for block in model:
        fully_shard(block, reshard_after_forward=True)
    return fully_shard(model)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("spread", [DistributedDataParallel, sharded])
def test_same_gradients_and_operators_run_again(spread: Callable[[nn.Module], nn.Module]) -> None:
    plain, ours = spread(network()), spread(network())

    @autoremat.checkpoint(budget=0.8, time_limit_seconds=0.5)
    def loss(x: Tensor) -> Tensor:
        return ours(x).sum()

    for _ in range(2):
        x = torch.randn(256, 16)
        plain(x).sum().backward()
        loss(x).backward()
    assert all(map(torch.equal, gradients(plain), gradients(ours)))
    stats = autoremat.stats(loss)
    assert stats.reruns > 0
    assert stats.unplanned == stats.deviations == 0
    assert stats.plan is not None
    assert "distributed" in {v.kind for v in stats.plan.program.values}


@pytest.mark.usefixtures("alone")
def test_what_needs_freed_parameters_stays_in_its_unit() -> None:
    """What a block hands on is asked for by the next one, when its parameters are gone; what is inside may go."""
    model = sharded(network())
    program = autoremat.plan(lambda x: model(x).sum(), torch.randn(8, 16), budget=1.0).program
    forward = [program.ops[i] for i in program.forward]
    again = {(op.module, op.name): op.why for op in forward}
    assert "freed" in again["0", "aten.add.Tensor"]
    assert "freed" in again["1", "aten.add.Tensor"]
    assert again["0.up", "aten.addmm.default"] == again["1", "aten.sigmoid.default"] == ""


class Routed(Block):
    """Leaves a loss of its own behind, which asks for what the block made after its parameters have been freed."""

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.sigmoid(self.up(x))
        self.extra = torch.tanh(inner).square().mean()
        return x + torch.sigmoid(self.down(torch.tanh(inner)))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("budget", [0.95, 0.7, 0.0])
def test_what_is_asked_for_outside_of_its_unit(budget: float) -> None:
    """The backward of the losses that the blocks leave behind runs before that of what the blocks have returned."""

    def routed() -> nn.Module:
        torch.manual_seed(0)
        return sharded(nn.Sequential(*(Routed() for _ in range(3))))

    plain, ours = routed(), routed()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum() + sum(block.extra for block in model)  # type: ignore[attr-defined]

    x = torch.randn(256, 16)
    if not budget:
        first = autoremat.checkpoint(lambda x: loss(ours, x), budget=1.0)
        first(x).backward()
        loss(plain, x).backward()
        plan = autoremat.stats(first).plan
        assert plan is not None
        budget = plan.floor_bytes
    step = autoremat.checkpoint(lambda x: loss(ours, x), budget=budget, time_limit_seconds=0.5)
    for _ in range(3):
        loss(plain, x).backward()
        step(x).backward()
    assert all(map(torch.equal, gradients(plain), gradients(ours)))
    stats = autoremat.stats(step)
    assert stats.reruns > 0
    assert stats.unplanned == stats.deviations == 0


@pytest.mark.usefixtures("alone")
def test_a_unit_that_is_not_gathered_for_its_backward() -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, 16), *network())
        for block in model:
            fully_shard(block, reshard_after_forward=True)
        model[0].set_unshard_in_backward(False)
        return fully_shard(model)

    plain, ours = made(), made()
    step = autoremat.checkpoint(lambda x: ours(x).sum(), budget=0.8, time_limit_seconds=0.5)
    for _ in range(3):
        x = torch.randint(32, (256,))
        plain(x).sum().backward()
        step(x).backward()
    assert all(map(torch.equal, gradients(plain), gradients(ours)))
    assert autoremat.stats(step).reruns > 0


@pytest.mark.usefixtures("beside_a_made_up_one")
def test_a_recording_runs_no_collective() -> None:
    """Every other process is taken to contribute the same; in this group nothing would arrive."""
    weight = torch.randn(16, 16, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        y = torch.tanh(x @ weight)
        parts = [torch.full_like(y, 7.0) for _ in range(2)]
        dist.all_gather(parts, y.detach())
        assert torch.equal(parts[1], y.detach()), "needs the numbers: recorded on real tensors"
        whole = torch.full((16, 16), 7.0)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its new name
        gather(whole, x.detach())
        assert torch.equal(whole[8:], x)
        return (torch.sigmoid(y) + parts[0] + whole[:8].mean()).sum()

    x = torch.randn(8, 16)
    program = autoremat.plan(step, x, budget=1.0).program
    assert program.recorded == "real"
    talks = [op for op in program.ops if op.name.startswith("c10d.")]
    assert [op.once for op in talks] == [Once.COMMUNICATES] * 2
    assert [len(op.in_place) for op in talks] == [2, 1], "what is received is written into what was there"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("talk", [dist.all_reduce, lambda y: dist.broadcast(y, 0)])
def test_a_forward_that_has_communicated_is_not_tried_again(talk: Callable[..., object]) -> None:
    """The others would wait for ever, or take what is sent for something else."""
    calls, refuse = [], [False]

    def step(x: Tensor) -> Tensor:
        calls.append(1)
        for _ in range(8):
            x = torch.sigmoid(x)
        talk(x[:1].detach().clone())
        if refuse[0]:
            raise torch.OutOfMemoryError("out of memory")
        return x.sum()

    run = autoremat.checkpoint(step, budget=1.0, time_limit_seconds=0.5)
    for _ in range(2):
        run(torch.randn(256, 64, requires_grad=True)).backward()
    refuse[0], before = True, len(calls)
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.randn(256, 64, requires_grad=True))
    assert len(calls) == before + 1
    assert autoremat.stats(run).retries == 0


@pytest.mark.usefixtures("alone")
def test_not_supported_is_said_and_runs_plainly() -> None:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("rows", "columns"))

    def both() -> nn.Module:
        model = network()
        for block in model:
            parallelize_module(block, mesh["columns"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["rows"])

    plain, ours = both(), both()
    loss = autoremat.checkpoint(lambda x: ours(x).sum(), budget=0.8)
    x = torch.randn(8, 16)
    plain(x).sum().backward()
    with pytest.warns(RuntimeWarning, match=r"DTensors already.*runs without checkpointing"):
        loss(x).backward()
    assert autoremat.stats(loss).unplanned == 1
    assert all(
        torch.equal(p.grad.to_local(), q.grad.to_local())  # type: ignore[union-attr]
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True)
    )
    with pytest.raises(NotSupported, match="DTensors already"):
        autoremat.plan(ours, x, budget=0.8)


def test_memory_that_was_taken_away_is_noticed() -> None:
    """As a graph that reaches into a unit of FSDP2 from outside its backward would find it."""
    frozen, scale = torch.randn(16, 16), torch.randn(16, requires_grad=True)

    @autoremat.checkpoint(budget=1.0, recompute="aten.mm.default")
    def step(x: Tensor) -> Tensor:
        return ((x @ frozen) * scale).sum()

    loss = step(torch.randn(64, 16))
    frozen.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="whose memory has been freed"):
        loss.backward()


@pytest.mark.usefixtures("beside_a_made_up_one")
def test_optimizers_of_several_processes() -> None:
    """The state of sharded parameters is as large as the shard; an optimizer of optimizers is not touched."""
    whole = optimizer_bytes(torch.optim.Adam(network().parameters(), foreach=True))
    shard = optimizer_bytes(torch.optim.Adam(sharded(network()).parameters(), foreach=True))
    assert 0.5 * whole.state <= shard.state <= 0.51 * whole.state
    assert 0.5 * whole.scratch <= shard.scratch <= 0.51 * whole.scratch
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, when this is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer

        zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.Adam, lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 16)).sum().backward()
    with pytest.raises(UnusableInput, match="steps another optimizer"):
        optimizer_bytes(zero)
    assert all(map(torch.equal, before, model.parameters()))
