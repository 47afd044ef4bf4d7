"""What ``benchmarks/gpu.py`` asks of the device: peaks, times, names. On the CPU the same, for the dry run.

The CUDA half has been written on a machine without such a device; the first ``make gpu`` is its first run.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoremat.engines.torch.world.memory_account import account, resident

Step = Callable[[], Any]


@dataclass(frozen=True)
class Peak:
    """Memory of one step, as the allocator counted it.

    Attributes:
        allocated_bytes: ``torch.cuda.max_memory_allocated()`` after the step, the statistics reset right before it;
            nothing is subtracted. On CPU the peak of the profiler's account.
        requested_bytes: the same without the allocator's rounding: peak of ``requested_bytes.all`` in
            ``torch.cuda.memory_stats()``. A block is rounded up to 512 bytes, one above 1 MiB may be left up to 1 MiB
            too large, and the allocator counts all of it as allocated.
        reserved_bytes: what the caching allocator took from the device, its cache emptied before; 0 on CPU.
        resident_bytes: what autoremat counts as there before the step: parameters, buffers, inputs.
        others_bytes: what else was requested before the step and stays, such as cuBLAS workspaces: no plan knows it.
        blocks: largest number of blocks in use at once; 0 on CPU.
        retries: how often the allocator had to give its cache back to get a block; 0 on CPU.
    """

    allocated_bytes: int
    requested_bytes: int
    reserved_bytes: int
    resident_bytes: int
    others_bytes: int
    blocks: int = 0
    retries: int = 0

    @property
    def own_bytes(self) -> int:
        """What a plan predicts: the bytes requested at the peak, without those that others held all the time."""
        return self.requested_bytes - self.others_bytes


class Cpu:
    """The CPU, as a stand-in: exact bytes, times that say little."""

    name = "cpu"

    def describe(self) -> dict[str, Any]:
        """What device this is."""
        return {"type": "cpu", "name": "CPU (dry run)", "driver": None, "total_bytes": None}

    def free_bytes(self) -> int | None:
        """None: the dry run's networks fit anywhere."""
        return None

    def release(self) -> None:
        """Let go of what nothing refers to."""
        gc.collect()

    def seconds(self, step: Step) -> float:
        """How long a step takes, begin to end."""
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    host_seconds = seconds

    def peak(self, step: Step, model: nn.Module, inputs: tuple[Tensor, ...]) -> Peak:
        """The account of one step."""
        before = resident(model, *inputs)
        peak = account(step, before).peak_bytes
        return Peak(peak, peak, 0, before, 0)

    def generator_states(self) -> list[Tensor]:
        """States of the default generators."""
        return [torch.get_rng_state()]


class Cuda:
    """The current CUDA device, with nothing else of this process on it."""

    name = "cuda"

    def describe(self) -> dict[str, Any]:
        """Name, driver, memory and libraries of the device."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "type": "cuda",
            "name": properties.name,
            "driver": _driver(),
            "total_bytes": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def free_bytes(self) -> int | None:
        """What the step may take: free on the device or in this process's cache."""
        self.release()
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Let go of what nothing refers to, and give the cache back."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def seconds(self, step: Step) -> float:
        """How long the device takes from the beginning of a step to its end, by events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def host_seconds(self, step: Step) -> float:
        """How long the host waits for a step, until the device is done, too."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def peak(self, step: Step, model: nn.Module, inputs: tuple[Tensor, ...]) -> Peak:
        """The caching allocator's statistics of one step."""
        self.release()
        before, own = torch.cuda.memory_stats(), resident(model, *inputs)
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        return Peak(
            allocated_bytes=torch.cuda.max_memory_allocated(),
            requested_bytes=after["requested_bytes.all.peak"],
            reserved_bytes=torch.cuda.max_memory_reserved(),
            resident_bytes=own,
            others_bytes=before["requested_bytes.all.current"] - own,
            blocks=after["active.all.peak"],
            retries=after["num_alloc_retries"] - before["num_alloc_retries"],
        )

    def generator_states(self) -> list[Tensor]:
        """States of the default generators of host and device."""
        return [torch.get_rng_state(), torch.cuda.get_rng_state()]


Device = Cpu | Cuda


def _driver() -> str | None:
    """The driver's version as nvidia-smi says it; None where it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        return lines[0].strip() if lines else None
    return None


@contextlib.contextmanager
def deterministic(*, strict: bool) -> Iterator[None]:
    """``torch.use_deterministic_algorithms(True)``; without ``strict``, kernels that have no such kind run as they are.

    Flash and memory-efficient attention add in a fixed order only where it is strict.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis.*")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def median_ratio(samples: list[float], plain: list[float]) -> float:
    """Median over the rounds of a step's time over that of the plain step in the same round."""
    return statistics.median(a / b for a, b in zip(samples, plain, strict=True))
