"""Jobs of several processes: a module to train and its step, built with and without autoremat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn import functional as distributed_functional
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

WIDTH, DEPTH, ROWS = 32, 4, 256


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Network(nn.Module):
    """Blocks between two layers; batch norm, if asked for, has buffers that DDP broadcasts."""

    def __init__(self, batch_norm: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm: nn.Module = nn.BatchNorm1d(WIDTH) if batch_norm else nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.out.weight = self.inp.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


LOSS = 3 * 4 * ROWS * WIDTH
"""What the loss takes at most: the square of the output, its gradient, and that of the output."""

IN_FLIGHT = 2 * LOSS
"""Gloo's thread lets go of what it has sent some time after the wait for it, plain or not: a few activations."""


Step = Callable[[Tensor], Tensor]
Job = tuple[nn.Module, Step]
"""The module whose parameters are trained, and what returns the loss."""
Make = Callable[[Callable[[Any], Any]], Job]
"""Builds a job; its argument is what wraps the part that is to be checkpointed."""


def loss_of(model: Callable[[Tensor], Tensor]) -> Step:
    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()

    return loss


# ---- jobs ------------------------------------------------------------------------------------------------------------


def ddp(order: str = "loss", model: dict[str, Any] | None = None, **options: Any) -> Make:
    """DistributedDataParallel: ``order`` says what is checkpointed (the loss, the DDP module, or what it wraps)."""

    def make(wrap: Callable[[Any], Any]) -> Job:
        network = Network(**(model or {}))
        replica = DistributedDataParallel(wrap(network) if order == "inner" else network, bucket_cap_mb=0.02, **options)
        if order == "outer":
            wrap(replica)
        loss = loss_of(replica)
        return replica, wrap(loss) if order == "loss" else loss

    return make


def fsdp(
    order: str = "loss", reshard: bool | None = None, root: bool | None = None, model: dict[str, Any] | None = None,
    **options: Any,
) -> Make:  # fmt: skip
    """FSDP2, a unit per block."""

    def make(wrap: Callable[[Any], Any]) -> Job:
        network = Network(**(model or {}))
        if order == "inner":
            wrap(network)
        for block in network.blocks:
            fully_shard(block, reshard_after_forward=reshard, **options)
            if order == "blocks":
                wrap(block)
        fully_shard(network, reshard_after_forward=root, **options)
        if order == "outer":
            wrap(network)
        loss = loss_of(network)
        return network, wrap(loss) if order == "loss" else loss

    return make


class Talking(nn.Module):
    """Collectives in the forward: features gathered from all, a running statistic reduced in place."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.network = Network()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        with torch.no_grad():
            mean = y.mean(0)
            dist.all_reduce(mean)
            self.mean.mul_(0.9).add_(mean, alpha=0.1)
        if self.looks and float(mean.sum()) < 1e9:  # needs the numbers: recorded on real tensors
            y = torch.tanh(y)
        everyone = torch.cat(distributed_functional.all_gather(torch.tanh(y[:8])))
        return torch.sigmoid(y @ everyone.t())


def talking(looks: bool = False) -> Make:
    def make(wrap: Callable[[Any], Any]) -> Job:
        model = Talking(looks)
        loss = wrap(loss_of(model))

        def step(x: Tensor) -> Tensor:
            """Rank 1 has inputs of its own sizes: it records when no other does."""
            step.calls += 1  # type: ignore[attr-defined]
            return loss(x[: ROWS - 32 * (step.calls // 2)] if dist.get_rank() else x)  # type: ignore[attr-defined]

        step.calls = 0  # type: ignore[attr-defined]
        return model, step

    return make


def tensor_parallel() -> Make:
    """DTensor parameters: columns of the first layer of a block, rows of the second."""

    def make(wrap: Callable[[Any], Any]) -> Job:
        network = Network()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in network.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return network, wrap(loss_of(network))

    return make


def sequence_parallel() -> Make:
    """As above, and what is between blocks is a DTensor that is sharded by rows."""

    def make(wrap: Callable[[Any], Any]) -> Job:
        network = Network()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in network.blocks:
            block.drop = nn.Identity()
            plan = {
                "norm": SequenceParallel(sequence_dim=0),
                "up": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
                "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
            }
            parallelize_module(block, mesh, plan)

        def rows(x: Tensor) -> Tensor:
            return DTensor.from_local(x, mesh, [Shard(0)])

        def forward(x: Tensor) -> Tensor:
            x = rows(network.inp(x))
            for block in network.blocks:
                x = block(x)
            return network.out(network.norm(x.to_local()))  # type: ignore[attr-defined]

        return network, wrap(loss_of(forward))

    return make


class Stage(nn.Module):
    """Half of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def pipeline_by_hand() -> Make:
    """Two stages that send activations on and gradients back."""

    def make(wrap: Callable[[Any], Any]) -> Job:
        stage = Stage()
        first = dist.get_rank() == 0
        run = wrap(stage if first else loss_of(stage))

        def step(x: Tensor) -> Tensor:
            if first:
                y = run(x)
                dist.send(y.detach(), 1)
                grad = torch.empty_like(y)
                dist.recv(grad, 1)
                y.backward(grad)
                return y.detach().mean()
            received = torch.empty_like(x)
            dist.recv(received, 0)
            loss = run(received.requires_grad_())
            loss.backward()
            assert received.grad is not None
            dist.send(received.grad, 0)
            return loss.detach()

        return stage, step

    return make


def pipeline(schedule: Any, microbatches: int) -> Make:
    """A stage under a schedule of torch.distributed.pipelining: several forwards before their backwards."""

    def make(wrap: Callable[[Any], Any]) -> Job:
        stage = wrap(Stage())
        rank, n = dist.get_rank(), dist.get_world_size()
        runner = schedule(
            PipelineStage(stage, rank, n, torch.device("cpu")),
            microbatches,
            loss_fn=lambda y, target: (y - target).square().mean(),
        )

        def step(x: Tensor) -> Tensor:
            losses: list[Tensor] = []
            if rank == 0:
                runner.step(x)
            else:
                runner.step(target=torch.zeros_like(x), losses=losses)
            return torch.stack([loss.detach() for loss in losses]).sum() if losses else torch.zeros(())

        return stage, step

    return make
