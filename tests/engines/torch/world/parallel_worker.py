"""One process of a distributed job: the same job without and with autoremat, compared bit by bit.

Started by torchrun: ``python -m torch.distributed.run --standalone --nproc-per-node 2 worker.py CASE``. Ends with an
error if gradients, loss or buffers differ, if a step takes more than its budget, or if nothing ran again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import autoremat
from autoremat.engines.torch.world.memory_account import account
from tests.engines.torch.world.parallel_jobs import (
    IN_FLIGHT,
    LOSS,
    ROWS,
    WIDTH,
    Job,
    Make,
    Talking,
    ddp,
    fsdp,
    loss_of,
    pipeline,
    pipeline_by_hand,
    sequence_parallel,
    talking,
    tensor_parallel,
)

SMALL = 4096
"""Bytes that no account has: numbers of Python's, and what hooks of torch.distributed make beside."""


# ---- comparing -------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, p in model.named_parameters():
        yield name, local(p).detach()
        if p.grad is not None:
            yield f"{name}.grad", local(p.grad)
    yield from model.named_buffers()


def resident(model: nn.Module, *more: Tensor) -> int:
    """Bytes of all storages that are there between two steps; DDP's buckets are not to be seen from Python."""
    found = [t for _, t in state_of(model)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*found, *more)}
    buckets = 0
    if isinstance(model, DistributedDataParallel):
        trained = [p for p in model.parameters() if p.requires_grad]
        buckets = sum(p.nbytes for p in trained)
        if model.gradient_as_bucket_view and all(p.grad is not None for p in trained):
            buckets = 0
    if isinstance(model, FSDPModule):  # padding of shards, which some ranks have
        groups = [m._get_fsdp_state()._fsdp_param_groups for m in model.modules() if isinstance(m, FSDPModule)]
        params = [p for gs in groups for g in gs for p in g.fsdp_params]
        storages |= {p._sharded_param_data.untyped_storage()._cdata: p._sharded_param_data.nbytes for p in params}
    return sum(storages.values()) + buckets


def train(
    make: Make, wrap: Callable[[Any], Any], steps: int, accumulate: int, to_none: bool, warm: int
) -> tuple[Any, list[int]]:
    """Train; returns all that must be equal, and the peak of every step but the first ones."""
    torch.manual_seed(0)
    model, loss = make(wrap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(100 + dist.get_rank())
    seen, peaks = [], []
    for k in range(steps * accumulate):
        x = torch.randn(ROWS, WIDTH)
        before = resident(model, x)
        losses: list[Tensor] = []
        last = k % accumulate == accumulate - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)

        def step(x: Tensor = x, losses: list[Tensor] = losses) -> None:
            value = loss(x)
            losses.append(value.detach().clone())
            if value.requires_grad:
                value.backward()

        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                step()
        elif k < warm * accumulate:
            step()
        else:
            peaks.append(account(step, before).peak_bytes)
        seen.append((losses[0], [(n, t.clone()) for n, t in state_of(model)], torch.get_rng_state()))
        if last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    return seen, peaks


def compare(
    make: Make, *, steps: int = 4, accumulate: int = 1, to_none: bool = True, share: float = 0.5,
    reruns: bool = True, most: float = 1.0, beside: int = 0, in_flight: int = 0,
    warm: int = 2, of_plain: float = 0.0, forwards: int = 1,
) -> None:  # fmt: skip
    """The job without and with autoremat.

    Args:
        make: builds it.
        steps: how many, at least three: DDP rebuilds its buckets in the second.
        accumulate: backwards for each of them.
        to_none: what becomes of gradients after a step.
        share: of the way from the floor to the plain peak, for the budget.
        reruns: whether operators must have run again.
        beside: bytes that the loss takes where it is outside of what is checkpointed.
        of_plain: for the budget, a share of the plain peak instead.
        forwards: how many may be waiting for their backward, and share the budget.
        in_flight: bytes of messages that may stay in memory for some time; that depends on the machine.
        warm: steps before the first that is measured: DDP makes new buckets in the second (or third) one.
        most: the largest share of the measured plain peak that may be measured with autoremat.
    """
    plain, plain_peaks = train(make, lambda target: target, steps, accumulate, to_none, warm)
    wrapped: list[Any] = []

    def wrap(target: Any, budget: Any = 1.0) -> Any:
        wrapped.append(autoremat.checkpoint(target, budget=budget))
        return wrapped[-1]

    train(make, wrap, 1, accumulate, to_none, warm)
    plan = autoremat.stats(wrapped[0]).plan
    assert plan is not None
    budget = int(plan.floor_bytes + share * (plan.plain_peak_bytes - plan.floor_bytes))
    if of_plain:  # that was a quick plan of a second backward
        budget = int(of_plain * plan.plain_peak_bytes)
    budget *= forwards  # they share it
    n = len(wrapped)
    ours, peaks = train(make, lambda target: wrap(target, budget), steps, accumulate, to_none, warm)
    stats = [autoremat.stats(w) for w in wrapped[n:]]
    where = f"rank {dist.get_rank()}: budget {budget:,}, plain {max(plain_peaks):,} (said {plan.plain_peak_bytes:,}), "
    print(f"{where}autoremat {max(peaks):,}, {sum(s.reruns for s in stats)} reruns", flush=True)
    for k, ((loss_a, state_a, random_a), (loss_b, state_b, random_b)) in enumerate(zip(plain, ours, strict=True)):
        assert torch.equal(loss_a, loss_b), f"loss of step {k}"
        assert torch.equal(random_a, random_b), f"generator after step {k}"
        for (name, a), (name_b, b) in zip(state_a, state_b, strict=True):
            assert name == name_b
            assert torch.equal(a, b), f"{name} after step {k}"
    if len(stats) == 1:
        assert max(peaks) <= budget + beside + in_flight + SMALL, where
    assert min(peaks) <= most * min(plain_peaks), f"{where}{peaks} {plain_peaks}"
    for s in stats:
        counted = s.calls, s.planned, s.unplanned, s.deviations, s.differing, s.reruns
        assert s.unplanned == s.deviations == s.differing == 0, counted
        assert not reruns or s.reruns > 0, counted


CASES: dict[str, Callable[[], None]] = {
    "ddp": lambda: compare(ddp()),
    "ddp-outer": lambda: compare(ddp("outer"), beside=LOSS),
    "ddp-inner": lambda: compare(ddp("inner"), beside=LOSS),
    "ddp-buffers": lambda: compare(ddp(model={"batch_norm": True})),
    "ddp-views": lambda: compare(ddp(gradient_as_bucket_view=True, model={"tied": True})),
    "ddp-kept-gradients": lambda: compare(ddp(gradient_as_bucket_view=True), to_none=False),
    "ddp-unused": lambda: compare(ddp(find_unused_parameters=True)),
    "ddp-static": lambda: compare(ddp(static_graph=True), warm=3),
    "ddp-accumulate": lambda: compare(ddp("outer"), beside=LOSS, accumulate=2, of_plain=0.7),
    "tensor-parallel": lambda: compare(tensor_parallel(), steps=6, in_flight=IN_FLIGHT),
    "sequence-parallel": lambda: compare(sequence_parallel(), steps=6, in_flight=IN_FLIGHT),
    "pipeline-by-hand": lambda: compare(pipeline_by_hand(), beside=LOSS, in_flight=IN_FLIGHT),
    "pipeline": lambda: compare(pipeline(ScheduleGPipe, 2), forwards=2, in_flight=IN_FLIGHT),
    "pipeline-1f1b": lambda: compare(  # the last stage goes backward after each forward
        pipeline(Schedule1F1B, 2), forwards=2 - dist.get_rank(), of_plain=0.7, in_flight=IN_FLIGHT
    ),
    # Every step of rank 1 is the first of its kind: where there is room, what will run again runs twice (self-check).
    "collectives": lambda: compare(talking(), most=1.1),
    "collectives-real": lambda: compare(talking(looks=True), share=0.7, most=1.1),
    "fsdp-floor": lambda: compare(fsdp(reshard=True), share=0.0),
    "fsdp": lambda: compare(fsdp(reshard=True)),
    "fsdp-kept": lambda: compare(fsdp(reshard=False)),
    "fsdp-outer": lambda: compare(fsdp("outer"), beside=LOSS),
    "fsdp-inner": lambda: compare(fsdp("inner"), beside=LOSS),
    "fsdp-blocks": lambda: compare(fsdp("blocks"), share=0.2),
    "fsdp-root-freed": lambda: compare(fsdp(reshard=True, root=True)),
    "fsdp-accumulate": lambda: compare(fsdp(), accumulate=2, of_plain=0.8),
    "fsdp-tied": lambda: compare(fsdp(model={"tied": True})),
    "fsdp-mixed": lambda: compare(
        fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    ),
}


def deviation() -> None:
    """Rank 0 alone takes another branch, in a forward with collectives and under both of the wrappers."""

    class Moody(Talking):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.sin(y) if self.moody and dist.get_rank() == 0 else y

    def make(build: Callable[[nn.Module], nn.Module], wrap: Callable[[Any], Any]) -> Job:
        model = Moody(looks=False)
        model.moody = False  # type: ignore[assignment]
        built = build(model)
        loss = wrap(loss_of(built))
        calls: list[int] = []

        def step(x: Tensor) -> Tensor:
            calls.append(1)
            model.moody = len(calls) == 3  # type: ignore[assignment]
            return loss(x)

        return built, step

    def sharded(model: nn.Module) -> nn.Module:
        for block in model.network.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        return fully_shard(model)

    for build in (lambda model: model, DistributedDataParallel, sharded):
        plain, _ = train(lambda wrap, build=build: make(build, wrap), lambda target: target, 5, 1, True, 9)
        wrapped: list[Any] = []

        def wrap(target: Any, wrapped: list[Any] = wrapped) -> Any:
            wrapped.append(autoremat.checkpoint(target, budget=0.8))
            return wrapped[-1]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            ours, _ = train(lambda w, build=build: make(build, w), wrap, 5, 1, True, 9)
        for (loss_a, state_a, _), (loss_b, state_b, _) in zip(plain, ours, strict=True):
            assert torch.equal(loss_a, loss_b)
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state_a, state_b, strict=True))
        stats = autoremat.stats(wrapped[0])
        assert (stats.deviations > 0) == (dist.get_rank() == 0), stats.deviations
        assert stats.reruns > 0


def infeasible() -> None:
    """A budget that no plan fits is an error on every rank before the first collective of the step."""
    model, loss = ddp()(lambda target: autoremat.checkpoint(target, budget=1000))
    with pytest.raises(autoremat.InfeasibleBudget, match="1000 bytes"):
        loss(torch.randn(ROWS, WIDTH))
    del model


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        for case in sys.argv[1:]:
            (CASES | {"deviation": deviation, "infeasible": infeasible})[case]()
            dist.barrier()
            print(f"rank {dist.get_rank()}: {case} passed", flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
