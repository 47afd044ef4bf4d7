"""Keeps operator costs in files, so later processes need not measure.

There is one file per *place*: the device, the version of torch, the number of threads, and the switches that decide
which kernels run. Each line holds one operator call as exact text, its cost, and a checksum. Lines are only ever
appended, a batch with a single write and no lock, so processes that write at once do not wait for each other. This is
safe on network disks too, where locks cannot be relied on. A damaged line (cut off because the disk was full, or run
together with another) fails its checksum and costs one measurement. Where no folder can be written, nothing is kept.

``AUTOREMAT_CACHE`` names a folder other than the user's cache folder; ``off`` keeps nothing. Only torch's own operators
are kept: an operator of someone else may do something different tomorrow under the same name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from autoremat.engines.torch.operators.signature import CallSignature, Items, TensorSpec

VARIABLE: Final = "AUTOREMAT_CACHE"
"""The environment variable that says where costs are kept."""
_OFF: Final = frozenset({"", "0", "off", "no", "none", "false"})
_MOST_BYTES: Final = 2 << 20
"""A larger file loses the older half of its lines.

Some 8,000 lines stay.
"""
_OWN: Final = frozenset({"aten", "prims"})
"""Namespaces whose operators change only with the version of torch."""
_LARGEST: Final = 1 << 50
"""More bytes than any operator takes."""


class Cost(NamedTuple):
    """What one operator call takes.

    Attributes:
        seconds: duration of one run.
        scratch_bytes: what the kernel allocates besides its results.
        made_bytes: size of every storage that the call makes, in the order of the results; empty where nothing has been
            run. Some kernels return a small result in the memory of a large temporary: in torch 2.13 the one number
            that ``mse_loss``, ``smooth_l1_loss``, ``binary_cross_entropy`` or ``soft_margin_loss`` returns occupies as
            many bytes as the prediction. Fake tensors do not show this.
        runs: how often the call was timed; 0 if the seconds are an estimate.
        has_run: whether the bytes come from a real run.
    """

    seconds: float
    scratch_bytes: int = 0
    made_bytes: tuple[int, ...] = ()
    runs: int = 0
    has_run: bool = False


# ---- places and calls as text ----------------------------------------------------------------------------------------


def place_of(device: torch.device) -> str:
    """Describe everything, besides the call itself, that decides its cost."""
    return " | ".join((*_machine(device.type, device.index), f"{torch.get_num_threads()} threads", *_switches()))


@cache
def _machine(kind: str, index: int | None) -> tuple[str, ...]:
    """Name the device and the version of torch."""
    versions = f"torch {torch.__version__}", f"CUDA {torch.version.cuda}", f"HIP {torch.version.hip}"
    if kind != "cuda":
        return (kind, _cpu_name(), torch.backends.cpu.get_cpu_capability(), platform.machine(), *versions)
    about = torch.cuda.get_device_properties(torch.device(kind, index) if index is not None else kind)
    return (kind, about.name, f"{about.total_memory} bytes", *versions, f"cuDNN {torch.backends.cudnn.version()}")


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _switches() -> tuple[str, ...]:
    try:
        precision = torch.get_float32_matmul_precision()
    # torch raises here while the older switches and ``fp32_precision`` contradict each other (ATen/Context.cpp, 2.13).
    except RuntimeError:
        precision = "mixed"
    cudnn = torch.backends.cudnn
    return (
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        f"float32 {precision}",
        f"cudnn {cudnn.enabled} {cudnn.benchmark} {cudnn.deterministic}",
        f"mkldnn {torch.backends.mkldnn.enabled}",
    )


def text_of(call: CallSignature) -> str | None:
    """Write a call as unique text; None for calls not kept."""
    if call.func.namespace not in _OWN:
        return None
    try:
        return f"{call.func} {_text(call.args)} {_text(call.kwargs)}"
    except TypeError:
        return None


def _text(tree: Any) -> str:
    if isinstance(tree, TensorSpec):
        beyond = f"+{tree.beyond}" if tree.beyond else ""
        return f"{_short(tree.dtype)}{list(tree.size)}{list(tree.stride)}{beyond}@{tree.device.type}"
    if isinstance(tree, Items):
        if tree.kind is dict:
            return "{" + ", ".join(f"{k!r}: {_text(v)}" for k, v in tree.content) + "}"
        return "[" + ", ".join(map(_text, tree.content)) + "]"
    if isinstance(tree, tuple):
        return "(" + ", ".join(map(_text, tree)) + ")"
    if tree is None or type(tree) in (bool, int, float, complex, str):
        return repr(tree)
    if isinstance(tree, torch.device):
        return f"device {tree.type}"
    if isinstance(tree, (torch.dtype, torch.layout, torch.memory_format)):
        return _short(tree)
    raise TypeError(f"no text for {type(tree).__name__}")


def _short(thing: object) -> str:
    return str(thing).removeprefix("torch.")


# ---- the files -------------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """Return the folder of the cost files; None where nothing is kept."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named.strip().lower() in _OFF else Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("autoremat", appauthor=False)


class Kept:
    """The costs kept for one place, read at the first question.

    Args:
        place: the place, as text.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._known: dict[str, Cost] = {}
        self._read_from: Path | None = None

    def get(self, call: CallSignature) -> Cost | None:
        """Return the cost of a call, if it is known."""
        path = self._path()
        if path != self._read_from:
            self._read_from, self._known = path, {} if path is None else _read(path, self._place)
        text = text_of(call) if self._known else None
        return None if text is None else self._known.get(text)

    def add(self, costs: Mapping[CallSignature, Cost]) -> None:
        """Write the costs of calls, for other processes."""
        path = self._path()
        found = {text: cost for call, cost in costs.items() if (text := text_of(call)) is not None}
        if path is not None and found:
            with suppress(OSError):
                _append(path, self._place, found)

    def _path(self) -> Path | None:
        where = folder()
        return None if where is None else where / _file_name(self._place)


def _file_name(place: str) -> str:
    """Return a readable file name that is unique to the place."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", place.partition(" | deterministic")[0]).strip("-")
    return f"costs-{words[:100]}-{hashlib.sha256(place.encode()).hexdigest()[:12]}.jsonl"


def _read(path: Path, place: str) -> dict[str, Cost]:
    """Read every sound line of a file; later lines win."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * _MOST_BYTES))
            lines = file.read(2 * _MOST_BYTES).split(b"\n")
    except OSError:
        return {}
    return dict(entry for line in lines if line and (entry := _parsed(line, place)) is not None)


def _parsed(line: bytes, place: str) -> tuple[str, Cost] | None:
    """Parse a line; None where it is damaged."""
    checksum, _, content = line.partition(b" ")
    if checksum != _checksum(content, place):
        return None
    try:
        text, seconds, scratch, made, runs = json.loads(content)
        cost = Cost(float(seconds), int(scratch), tuple(map(int, made)), int(runs), has_run=True)
    except (ValueError, TypeError):
        return None
    is_sound = math.isfinite(cost.seconds) and cost.seconds >= 0 and cost.runs >= 0
    is_sound &= all(0 <= n < _LARGEST for n in (cost.scratch_bytes, *cost.made_bytes))
    return (text, cost) if is_sound and isinstance(text, str) else None


def _line(text: str, cost: Cost, place: str) -> bytes:
    content = json.dumps([text, *cost[:4]], separators=(",", ":")).encode()
    return _checksum(content, place) + b" " + content


def _checksum(content: bytes, place: str) -> bytes:
    """Compute the checksum of a line, valid for this place only."""
    return f"{zlib.crc32(content, zlib.crc32(place.encode())):08x}".encode()


def _append(path: Path, place: str, costs: Mapping[str, Cost]) -> None:
    """Add lines with one write, so no other process's lines come between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Start with a line break: the line before may have been cut off.
    batch = b"\n" + b"\n".join(_line(text, cost, place) for text, cost in costs.items()) + b"\n"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, batch)
        nbytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if nbytes > _MOST_BYTES:
        _shorten(path, place)


def _shorten(path: Path, place: str) -> None:
    """Keep only the newest lines of a file.

    Lines that other processes append meanwhile may be lost; they are measured once more.
    """
    kept, size = [], 0
    for text, cost in reversed(_read(path, place).items()):
        kept.append(_line(text, cost, place))
        size += len(kept[-1]) + 1
        if size > _MOST_BYTES // 2:
            break
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        try:
            file.write(b"\n".join(reversed(kept)) + b"\n")
            file.close()
            os.replace(file.name, path)
        except OSError:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise
