"""When the device runs out of memory in spite of the plan: notice it, make room, say what the plan accounts for."""

from __future__ import annotations

import gc
import os
from collections import Counter

import torch

from autoremat.program import Plan, simulate

_MARKS = ("can't allocate memory", "not enough memory", "out of memory")
"""How allocators without an exception of their own say it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator has refused."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MARKS)


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes() -> int:
    """What the device has left, less a twentieth: on CUDA what its allocator could still have."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return int(0.95 * (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()))
    return int(0.95 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def without_frames(error: BaseException) -> BaseException:
    """The error, and those behind it, without the frames they passed through and the tensors in them."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def told(error: BaseException, plan: Plan | None) -> torch.OutOfMemoryError:
    """The allocator's error with the plan's account of memory beside it."""
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
