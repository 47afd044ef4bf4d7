"""Measures one step by the allocator's own account of memory.

``torch.profiler`` (``profile_memory=True``) reports every allocation and every release of PyTorch's CPU allocator with
its address and size, temporaries inside kernels included. Their running sum, on top of what was resident before, is the
memory of the step; on CPU it is the same to the byte from run to run. Nothing of autoremat takes part.

Not seen: memory that other libraries allocate for themselves (oneDNN's scratch pad, BLAS buffers).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# Kineto (torch's profiler, 2.13) prints lines at start and stop, which would run through the progress display. It reads
# this variable when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from autoremat.engines.torch.operators.values import storage_of


@dataclass(frozen=True)
class Account:
    """Memory of one step as the allocator saw it.

    Attributes:
        before_bytes: what was resident before the step.
        seconds: moment of every allocation or release, counted from the first one.
        resident_bytes: bytes in memory right after each of them.
    """

    before_bytes: int
    seconds: tuple[float, ...]
    resident_bytes: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that was in memory at any moment of the step."""
        return max(self.resident_bytes, default=self.before_bytes)

    @property
    def end_bytes(self) -> int:
        """What was in memory when the step was over."""
        return self.resident_bytes[-1] if self.resident_bytes else self.before_bytes


def account(step: Callable[[], object], before_bytes: int = 0) -> Account:
    """Run ``step`` once and add up what the CPU allocator did.

    Blocks that existed before the step count to its end even if the step releases them, because the profiler does not
    report their sizes. So set gradients to ``None`` before the call, not in the step, and the account is exact.

    Args:
        step: called once without arguments, under the profiler; its result is dropped before the account ends.
        before_bytes: what is resident before, usually ``resident(model, optimizer, *inputs)``.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        step()
    return account_of(prof, before_bytes)


def account_of(prof: profile, before_bytes: int) -> Account:
    """Add up what a stopped profiler saw of the CPU allocator.

    The profiler must have run with ``profile_memory=True``.
    """
    return _add_up(_events(prof), before_bytes)


def measured_peak(step: Callable[[], object], *things: nn.Module | torch.optim.Optimizer | Tensor) -> int:
    """Measure the peak of one step, on top of what was resident.

    On CPU by the profiler's account; on CUDA by the caching allocator's statistics (written, not yet run).

    Args:
        step: called once without arguments.
        things: modules, optimizers and tensors that are resident before the step.
    """
    before = resident(*things)
    if not any(t.is_cuda for thing in things for t in _tensors(thing)):
        return account(step, before).peak_bytes
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - others


def _events(prof: profile) -> list[tuple[int, int, int]]:
    """List allocations (positive bytes) and releases (negative) in time order.

    Each is ``(nanoseconds, address, bytes)``.
    """
    found = []
    results: Any = prof.profiler
    stack = list(results.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return sorted(found, key=lambda e: e[0])


def _add_up(events: Iterable[tuple[int, int, int]], before_bytes: int) -> Account:
    """Sum up the blocks of this step; other releases are left out."""
    alive: dict[int, int] = {}
    current, seconds, resident_bytes, start = before_bytes, [], [], None
    for nanoseconds, address, nbytes in events:
        if nbytes > 0:
            alive[address] = nbytes
            current += nbytes
        else:
            current -= alive.pop(address, 0)
        start = nanoseconds if start is None else start
        seconds.append((nanoseconds - start) * 1e-9)
        resident_bytes.append(current)
    return Account(before_bytes, tuple(seconds), tuple(resident_bytes))


def resident(*things: nn.Module | torch.optim.Optimizer | Tensor) -> int:
    """Add up the bytes behind modules, optimizer states and tensors.

    Of a module these are parameters, buffers and gradients. Each storage counts once, however many tensors view it;
    sparse tensors do not count.
    """
    storages = (storage_of(t) for thing in things for t in _tensors(thing))
    return sum({s.data_ptr(): s.nbytes() for s in storages if s is not None}.values())


def _tensors(thing: nn.Module | torch.optim.Optimizer | Tensor) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, nn.Module):
        yield from thing.buffers()
        for p in thing.parameters():
            yield from (p,) if p.grad is None else (p, p.grad)
    else:
        for state in thing.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor))
