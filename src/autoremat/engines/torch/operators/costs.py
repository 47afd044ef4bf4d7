"""What operators take, kept between processes: so a second process has nothing to measure.

A file per *place*: the device, the version of torch, the number of threads and the switches that decide which kernels
run. Each line of it is one call of an operator as exact text, with what it takes, and a checksum. Lines are only ever
appended, a batch by one write, without a lock: processes that write at once do not wait for each other, also on a
network disk, where locks are not to be relied on. What is damaged (a line cut off where the disk was full, two that run
into each other) fails its checksum, and costs one measurement. Where there is no folder that can be written, all goes
on without.

``AUTOREMAT_CACHE`` names another folder than the user's cache folder, or, as ``off``, none. Only operators of torch
itself are kept: another one may be another by tomorrow, under the same name.
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
"""The variable of the environment that says where costs are kept."""
_OFF: Final = frozenset({"", "0", "off", "no", "none", "false"})
_MOST_BYTES: Final = 2 << 20
"""A larger file loses the older half of its lines; some 8,000 stay."""
_OWN: Final = frozenset({"aten", "prims"})
"""Where the operators are that change with the version of torch only."""
_LARGEST: Final = 1 << 50
"""No operator takes more bytes."""


class Cost(NamedTuple):
    """What one operator call takes.

    Attributes:
        seconds: of one run.
        scratch_bytes: what the kernel allocates beside its results.
        made_bytes: of every storage that it makes, in the order of the results; empty where nothing has been run. Some
            kernels leave their result in memory that was meant for more: the one number that ``mse_loss``,
            ``smooth_l1_loss``, ``binary_cross_entropy`` or ``soft_margin_loss`` returns lies in as many bytes as the
            prediction takes. Fake tensors do not tell.
        runs: how often it was timed; 0 where the seconds are an estimate.
        has_run: the bytes are those of a run.
    """

    seconds: float
    scratch_bytes: int = 0
    made_bytes: tuple[int, ...] = ()
    runs: int = 0
    has_run: bool = False


# ---- places and calls as text ----------------------------------------------------------------------------------------


def place_of(device: torch.device) -> str:
    """All that decides, beside a call itself, what the call takes."""
    return " | ".join((*_machine(device.type, device.index), f"{torch.get_num_threads()} threads", *_switches()))


@cache
def _machine(kind: str, index: int | None) -> tuple[str, ...]:
    """The device and the version of torch."""
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
    except RuntimeError:  # torch refuses to say while older and newer switches contradict each other
        precision = "mixed"
    cudnn = torch.backends.cudnn
    return (
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        f"float32 {precision}",
        f"cudnn {cudnn.enabled} {cudnn.benchmark} {cudnn.deterministic}",
        f"mkldnn {torch.backends.mkldnn.enabled}",
    )


def text_of(call: CallSignature) -> str | None:
    """A call as text, another one for every other call; None for calls that are not kept."""
    if call.func.namespace not in _OWN:
        return None
    try:
        return f"{call.func} {_text(call.args)} {_text(call.kwargs)}"
    except TypeError:
        return None


def _text(tree: Any) -> str:
    if isinstance(tree, TensorSpec):
        return f"{_short(tree.dtype)}{list(tree.size)}{list(tree.stride)}@{tree.device.type}"
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
    """Where costs are kept; None where they are not."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named.strip().lower() in _OFF else Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("autoremat", appauthor=False)


class Kept:
    """What is kept of one place: read once, at the first question.

    Args:
        place: which.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._known: dict[str, Cost] = {}
        self._read_from: Path | None = None

    def get(self, call: CallSignature) -> Cost | None:
        """What a call takes, if it is known."""
        path = self._path()
        if path != self._read_from:
            self._read_from, self._known = path, {} if path is None else _read(path, self._place)
        text = text_of(call) if self._known else None
        return None if text is None else self._known.get(text)

    def add(self, costs: Mapping[CallSignature, Cost]) -> None:
        """Keep what calls take, for other processes."""
        path = self._path()
        found = {text: cost for call, cost in costs.items() if (text := text_of(call)) is not None}
        if path is not None and found:
            with suppress(OSError):
                _append(path, self._place, found)

    def _path(self) -> Path | None:
        where = folder()
        return None if where is None else where / _file_name(self._place)


def _file_name(place: str) -> str:
    """A name that says what is in it, and another one for every other place."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", place.partition(" | deterministic")[0]).strip("-")
    return f"costs-{words[:100]}-{hashlib.sha256(place.encode()).hexdigest()[:12]}.jsonl"


def _read(path: Path, place: str) -> dict[str, Cost]:
    """All that can be read of a file; the later of two lines about one call."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * _MOST_BYTES))
            lines = file.read(2 * _MOST_BYTES).split(b"\n")
    except OSError:
        return {}
    return dict(entry for line in lines if line and (entry := _parsed(line, place)) is not None)


def _parsed(line: bytes, place: str) -> tuple[str, Cost] | None:
    """What a line says; None where it is damaged."""
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
    """Of what a line says, and of the place, so that a line says nothing anywhere else."""
    return f"{zlib.crc32(content, zlib.crc32(place.encode())):08x}".encode()


def _append(path: Path, place: str, costs: Mapping[str, Cost]) -> None:
    """Add lines, by one write: no other process's comes in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line break first: the line before may have been cut off.
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
    """Keep the newest lines; what others append meanwhile may be lost, and is measured once more."""
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
