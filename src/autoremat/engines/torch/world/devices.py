"""Checks where the tensors of a step are.

They must be on one device, which is there, and share no memory without torch's knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from autoremat.engines.torch.operators.values import storage_of
from autoremat.engines.torch.world.modules import named_tensors
from autoremat.engines.torch.world.problems import UnusableInput


def check_target(device: torch.device | str) -> None:
    """Refuse a device that is not there: autograd would abort the process."""
    try:
        kind = torch.device(device).type
        there = kind == "cpu" or torch.get_device_module(kind).is_available()
    except RuntimeError:
        there = False
    if not there:
        raise UnusableInput(
            f"device {str(device)!r} is not available to torch {torch.__version__} here; leave it out, name one that "
            "is, or record on the machine that will train"
        )


def free_bytes(device: torch.device) -> int:
    """Return what a device has left, as far as known."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_free_on_machine(), _free_in_group())


def _free_on_machine() -> int:
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 32  # nobody tells


def _free_in_group() -> int:
    """Return what the control group, such as a container, may still take."""
    with suppress(OSError, ValueError):  # no limit is the word "max"
        group = Path("/sys/fs/cgroup")
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return 1 << 62


def check_devices(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> None:
    """Refuse models and inputs spread over several devices.

    Scalars on the CPU are allowed, and so are skeletons on meta beside real modules (ensembles of ``torch.func``).
    """
    tensors = _with_memory(modules)
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    devices = {str(t.device) for t in tensors}
    if len(devices) > 1:
        raise UnusableInput(
            f"parameters and inputs are on several devices ({', '.join(sorted(devices))}); a budget is for one device: "
            "move the model and its inputs to the same one before the call"
        )


def _with_memory(modules: Sequence[nn.Module]) -> list[Tensor]:
    """List parameters and buffers, those on meta if all are."""
    tensors = [t for _, _, t in named_tensors(modules)]
    return [t for t in tensors if t.device.type != "meta"] or tensors


def is_unreal(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> bool:
    """Tell whether tensors are fake or on meta, so no operator runs."""
    tensors = _with_memory(modules)
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in tensors)


def refuse_shared_memory(modules: Sequence[nn.Module], args: Any, kwargs: Any) -> None:
    """Raise if two storages lie on the same memory.

    Two tensors on one NumPy array are an example; fake tensors would not know of it.
    """
    if is_unreal(modules, args, kwargs):
        return
    tensors = [t for _, _, t in named_tensors(modules) if not nn.parameter.is_lazy(t)]
    tensors += [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    storages = {s._cdata: s for s in map(storage_of, tensors) if s is not None and s.nbytes()}
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages.values())
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise RuntimeError("two tensors share memory without torch's knowledge")
