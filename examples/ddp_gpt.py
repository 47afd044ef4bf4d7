"""Train a byte-level GPT in several processes, each within its own memory budget.

    torchrun --standalone --nproc-per-node 2 examples/ddp_gpt.py [ddp|fsdp] [steps] [budget]

`ddp` replicates the model (DistributedDataParallel), `fsdp` shards it (fully_shard, a unit per block). The budget is
what `autoremat.checkpoint` takes: "120MB", "0.5", "50%"; it holds in every process.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import autoremat
from autoremat.demo.data import stdlib_bytes, text_batches
from autoremat.demo.models import GPT, GPTConfig


def spread(model: GPT, how: str) -> nn.Module:
    """The model over all processes; nothing of autoremat."""
    if how == "ddp":
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def main(how: str = "ddp", steps: int = 20, budget: str = "50%") -> None:
    """Train; the first process prints the loss and the plan, each one what its steps took."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = spread(GPT(GPTConfig(blocks=4, width=64, heads=4, context=128)).to(device), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # The function returns the loss, so that all memory of forward and backward lies inside.
    @autoremat.checkpoint(budget=budget, optimizer=optimizer)
    def loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    batches = text_batches(stdlib_bytes(), batch=8, context=128, seed=rank)  # other data in every process
    for step in range(steps):
        x, y = (t.to(device) for t in next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(x, y)
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss := loss.detach() / world)
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    done = autoremat.stats(loss_fn)
    if rank == 0:
        print(done.plan)
    dist.barrier()
    print(f"process {rank}: {done.reruns} operators ran again in {done.calls} steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((str, int, str), sys.argv[1:], strict=False)))
