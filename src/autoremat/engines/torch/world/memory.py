"""Handles a device that runs out of memory despite the plan.

It notices the refusal, makes room, and says what the plan accounts for.
"""

from __future__ import annotations

import gc
import os
from collections import Counter

import torch

from autoremat.program import Plan, simulate

_MARKS = ("can't allocate memory", "not enough memory", "out of memory")
"""The words of allocators that have no exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is an allocator's refusal."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def free_memory() -> None:
    """Give back memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes() -> int:
    """Return 95 % of what the device has left.

    On CUDA that includes what the caching allocator has reserved and does not use.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(0.95 * (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()))
    return int(0.95 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def without_frames(error: BaseException) -> BaseException:
    """Drop the frames, and the tensors in them, from an error chain."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def told(error: BaseException, plan: Plan | None) -> torch.OutOfMemoryError:
    """Add the plan's account of memory to the allocator's error."""
    if plan is None or (isinstance(error, torch.OutOfMemoryError) and "autoremat" in str(error)):
        return error if isinstance(error, torch.OutOfMemoryError) else torch.OutOfMemoryError(str(error))
    program, timeline = plan.program, simulate(plan.program, plan.schedule)
    kinds: Counter[str] = Counter()
    for v in timeline.resident_at_peak:
        kinds[program.values[v].kind or "value"] += program.values[v].nbytes
    kinds["scratch"] = plan.peak_bytes - sum(kinds.values())
    account = ", ".join(f"{kind} {nbytes:,}" for kind, nbytes in kinds.most_common() if nbytes > 0)
    op = program.ops[timeline.peak_op]
    return torch.OutOfMemoryError(
        f"out of memory under a autoremat plan whose peak is {plan.peak_bytes:,} bytes (budget {plan.budget_bytes:,}), "
        f"at {op.name} in {op.module or 'the step'}: {account} bytes. What runs outside the callable, other processes "
        "and the allocator's own rounding are not in this account. The next step is planned for less; if that is not "
        f"enough, name a smaller budget (the smallest known is {plan.floor_bytes:,} bytes). The allocator said: {error}"
    )
