"""Finds seconds and scratch bytes of operators by measuring or estimating.

A measurement runs the operator on the device; an estimate is made from FLOPs and bytes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerConfig, ProfilerState
from torch.utils._python_dispatch import _disable_current_modes

from autoremat.engines.torch.operators.costs import Cost, Kept, place_of
from autoremat.engines.torch.operators.facts import tensors_in
from autoremat.engines.torch.operators.signature import CallSignature, TensorSpec, thaw

Progress = Callable[[str, float], None]
FREE: Final = Cost(0.0)

_MIN_SECONDS: Final = 0.02
"""A call is timed again until its runs take this long."""
_MAX_REPEATS: Final = 5
"""A call is timed at most this often."""
_MIN_REPEATS: Final = 3
"""A call shorter than ``_LONG_SECONDS`` is timed at least this often.

A single run may be far too slow.
"""
_LONG_SECONDS: Final = 0.5

_STEPS: Final = 2.0
"""Timing goes on for about as long as this many steps take."""
_LEAST_SECONDS: Final = 0.1
"""Timing goes on for at least this long."""
_ONCE_SECONDS: Final = 1.0
"""For as long again, plus this, further calls are timed once each."""

_CACHE_BYTES: Final = 1 << 26
"""Memory written before each timed call, to flush the caches.

It is less where there is less room.
"""

_DRAWN: Final = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Types whose random numbers need no temporary of another type."""

_NEEDS_ITS_WORKSPACE: Final = frozenset({"aten._cudnn_rnn_backward", "aten.miopen_rnn_backward"})
"""Operators that read pointers or sizes from a byte tensor.

Their forward wrote it; on any other bytes they crash.
"""

_LSTM_BACKWARD: Final = "aten.mkldnn_rnn_layer_backward"
"""Needs such a workspace too, but a forward can supply it."""

_GROUPED: Final = frozenset({"aten._grouped_mm", "aten._scaled_grouped_mm"})
"""Matrix products with a tensor of offsets that end each group.

With offsets of zero they would have nothing to do.
"""

_MEASURED: dict[tuple[CallSignature, str], Cost] = {}
"""By call and place: costs measured here or kept by another process."""
_KEPT: dict[str, Kept] = {}
_FACTORS: dict[Any, list[float]] = {}
"""By operator: its timed seconds as multiples of the estimates."""


class Rates(NamedTuple):
    """What a device does in a second, roughly.

    For a plan only the ratio of operators to each other matters.
    """

    flops: float
    bytes: float
    launch_seconds: float


_RATES: Final = {"cpu": Rates(1e11, 2e10, 3e-6), "cuda": Rates(1e14, 1.5e12, 5e-6)}


def measure_all(
    signatures: Sequence[CallSignature | None], progress: Progress | None = None, *, room_bytes: int | None = None,
    most_bytes: int | None = None, outputs: Sequence[int] = (),
) -> list[Cost]:  # fmt: skip
    """Return the cost of every call, running those that are not known.

    Each distinct unknown call is run alone, on random numbers. All are run once, for what they allocate. Timing takes
    about as long as a few steps: the calls that seem to take longest are timed first, several times each, then others
    once. When the time is over, the seconds of the rest are estimates, scaled by what was timed. A call that cannot run
    on random numbers is estimated, too. Random generators are left as they were. In memory at a time are the arguments
    (copies, of weights too), results and scratch of one call, and the memory written to flush the caches. What is found
    out is kept for other processes (``costs``).

    Args:
        signatures: the calls; None costs nothing.
        progress: told how far it is.
        room_bytes: what all this may take at most: caches are flushed as far as there is room; None: no limit.
        most_bytes: a call whose arguments and results take more is estimated, not run; None: all are run.
        outputs: bytes that each call writes; for ``most_bytes``.
    """
    times, keys = Counter(s for s in signatures if s is not None), _Keys()
    written = dict(zip(signatures, outputs, strict=False))  # outputs may be left out altogether
    known = {s: cost.seconds for s in times if (cost := _known(s, keys)) is not None}
    expected = {s: _expected_seconds(s) for s in times if s not in known}
    seconds = known | expected
    new = sorted(expected, key=expected.__getitem__, reverse=True)
    if room_bytes is not None:
        room_bytes -= torch.get_rng_state().nbytes  # the generator's state, saved meanwhile
    step_seconds = sum(n * seconds[s] for s, n in times.items())
    begin, limit = time.perf_counter(), max(_LEAST_SECONDS, _STEPS * step_seconds)
    found: dict[CallSignature, Cost] = {}
    with _undisturbing():
        for i, signature in enumerate(new):
            if most_bytes is None or _taken_bytes(signature) + written.get(signature, 0) <= most_bytes:
                spent = time.perf_counter() - begin
                repeats = _MAX_REPEATS if spent < limit else int(spent < 2 * limit + _ONCE_SECONDS)
                found[signature] = _measure(signature, room_bytes, repeats)
            if progress is not None:
                progress("measuring operators", (i + 1) / len(new))
    _keep(found, keys)
    return _costs(signatures, written, keys)


def known_all(signatures: Sequence[CallSignature | None], outputs: Sequence[int]) -> list[Cost]:
    """Return the cost of every call without running any.

    What is known, here or from another process, is used; the rest is estimated.
    """
    return _costs(signatures, dict(zip(signatures, outputs, strict=True)), _Keys())


def _costs(
    signatures: Sequence[CallSignature | None], written: Mapping[CallSignature | None, int], keys: _Keys
) -> list[Cost]:
    """Return known costs, and estimates scaled by them for other calls."""
    found = {s: _known(s, keys) for s in dict.fromkeys(signatures) if s is not None}
    costs = {s: cost or _scaled(s, written.get(s, 0)) for s, cost in found.items()}
    return [FREE if s is None else costs[s] for s in signatures]


def _known(signature: CallSignature, keys: _Keys) -> Cost | None:
    """Return the cost of a call measured here or kept elsewhere."""
    key = keys.of(signature)
    if key is None:
        return None
    cost = _MEASURED.get(key)
    if cost is None and (cost := _kept(key[1]).get(signature)) is not None:
        _MEASURED[key] = cost
        _learn(signature, cost)
    return cost


def _keep(found: Mapping[CallSignature, Cost], keys: _Keys) -> None:
    """Remember what has been measured, here and for other processes."""
    by_place: dict[str, dict[CallSignature, Cost]] = {}
    for signature, cost in found.items():
        key = keys.of(signature)
        if key is not None:
            _MEASURED[key] = cost
            if cost.has_run:
                by_place.setdefault(key[1], {})[signature] = cost
    for place, costs in by_place.items():
        _kept(place).add(costs)


def _kept(place: str) -> Kept:
    return _KEPT.setdefault(place, Kept(place))


class _Keys:
    """The keys under which calls are known; each device is described once."""

    def __init__(self) -> None:
        self._places: dict[torch.device, str] = {}

    def of(self, signature: CallSignature) -> tuple[CallSignature, str] | None:
        """Return a key that calls of equal cost share.

        None where nobody has used the device yet, or where there is none.
        """
        devices = {s.device for s in _specs(signature)}
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_initialized()):
            return None
        if device not in self._places:
            self._places[device] = place_of(device)
        return signature, self._places[device]


def _scaled(signature: CallSignature, output_bytes: int) -> Cost:
    """Estimate a cost, corrected by what has been measured."""
    return estimate(signature, output_bytes)._replace(seconds=_expected_seconds(signature, output_bytes))


def _taken_bytes(signature: CallSignature) -> int:
    """Add up the bytes of a call's arguments."""
    return sum((extent_of(s) + s.beyond) * s.dtype.itemsize for s in _specs(signature))


def _expected_seconds(signature: CallSignature, output_bytes: int = 0) -> float:
    """Estimate seconds, corrected by what operators have taken so far.

    The correction is that of the same operator, or else of all operators.
    """
    known = _FACTORS.get(signature.func) or [f for factors in _FACTORS.values() for f in factors]
    return estimate(signature, output_bytes).seconds * (median(known) if known else 1.0)


def _learn(signature: CallSignature, cost: Cost) -> None:
    """Correct later estimates by what an operator was timed to take."""
    if cost.runs and (rough := estimate(signature, 0).seconds) > 0:
        _FACTORS.setdefault(signature.func, []).append(cost.seconds / rough)


def estimate_all(
    signatures: Sequence[CallSignature | None], outputs: Sequence[int], backend: str | None = None
) -> list[Cost]:
    """Make roofline estimates of calls.

    The estimate is the larger of FLOPs and bytes over the device's rates, plus a launch.

    Args:
        signatures: the calls; None costs nothing.
        outputs: bytes that each call writes.
        backend: "cpu" or "cuda"; taken from the arguments when None.
    """
    return [FREE if s is None else estimate(s, n, backend) for s, n in zip(signatures, outputs, strict=True)]


def estimate(signature: CallSignature, output_bytes: int, backend: str | None = None) -> Cost:
    """Make the roofline estimate of one call."""
    specs = list(_specs(signature))
    device = backend or (specs[0].device.type if specs else "cpu")
    rates = _RATES.get(device, _RATES["cuda"])
    moved = output_bytes + sum(math.prod(s.size) * s.dtype.itemsize for s in specs)
    return Cost(rates.launch_seconds + max(_flops(signature) / rates.flops, moved / rates.bytes))


@lru_cache(maxsize=4096)
def _flops(signature: CallSignature) -> float:
    """Count FLOPs with torch's counter, on meta tensors; 0 if not counted."""
    from torch.utils.flop_counter import flop_registry

    count = flop_registry.get(signature.func.overloadpacket)
    if count is None:
        return 0.0
    try:
        with _disable_current_modes():  # a fake mode would take a hundred times as long
            args, kwargs = thaw(signature.args, _meta), thaw(signature.kwargs, _meta)
            out = signature.func(*args, **kwargs)
        return float(count(*args, **kwargs, out_val=out))
    except Exception:  # noqa: BLE001 - a formula that does not know these arguments is no reason to fail
        return 0.0


def _meta(spec: TensorSpec) -> Tensor:
    return torch.empty_strided(spec.size, spec.stride, dtype=spec.dtype, device="meta")


def _specs(signature: CallSignature) -> Iterable[TensorSpec]:
    found: list[TensorSpec] = []
    thaw((signature.args, signature.kwargs), found.append)
    return found


def _measure(signature: CallSignature, room_bytes: int | None, repeats: int) -> Cost:
    if str(signature.func.overloadpacket) in _NEEDS_ITS_WORKSPACE:
        return estimate(signature, 0)
    try:
        cost = _measure_for_real(signature, room_bytes, repeats)
    except Exception:  # noqa: BLE001 - random numbers do not suit every operator: then an estimate has to do
        return estimate(signature, 0)
    _learn(signature, cost)
    return cost._replace(has_run=True)


def _measure_for_real(signature: CallSignature, room_bytes: int | None, repeats: int = _MAX_REPEATS) -> Cost:
    """Measure a call, timed at most ``repeats`` times.

    With 0 repeats its seconds are estimated.
    """
    args, kwargs = thaw(signature.args, _random), thaw(signature.kwargs, _random)
    func = signature.func
    if str(func.overloadpacket) in _GROUPED:
        _fill_groups(args, kwargs)
    elif str(func.overloadpacket) == _LSTM_BACKWARD:
        args = _with_workspace(args)
    cuda = any(s.device.type == "cuda" for s in _specs(signature))
    begin = time.perf_counter()
    scratch, made = (_memory_cuda if cuda else _memory_cpu)(func, args, kwargs)
    if repeats == 0:  # a watched run takes longer than one alone, so its time is an upper bound
        return Cost(min(_expected_seconds(signature, sum(made)), time.perf_counter() - begin), scratch, made)
    if repeats == 1:
        return Cost(_time_once(func, args, kwargs, cuda), scratch, made, 1)
    cache_bytes = _CACHE_BYTES
    if room_bytes is not None:
        taken = _taken_bytes(signature) + scratch + sum(made)
        cache_bytes = max(0, min(cache_bytes, room_bytes - taken))
    flush = torch.empty(cache_bytes, dtype=torch.uint8, device="cuda" if cuda else "cpu")
    durations: list[float] = []
    while _asks_for_another(durations):
        flush.zero_()  # in a step, what an operator reads was written long ago
        durations.append(_time_once(func, args, kwargs, cuda))
    # Take the least: whatever else the machine does can only add to the seconds.
    return Cost(min(durations), scratch, made, len(durations))


def _asks_for_another(durations: Sequence[float]) -> bool:
    if len(durations) < _MIN_REPEATS:
        return sum(durations) < _LONG_SECONDS
    return len(durations) < _MAX_REPEATS and sum(durations) < _MIN_SECONDS


def _fill_groups(args: Any, kwargs: Any) -> None:
    """Fill in offsets that end groups of equal size.

    The groups lie along the rows of one matrix, the columns of the other, or the dimension that both sum over.
    """
    offsets = next((t for t in tensors_in((args, kwargs)) if t.dtype is torch.int32), None)
    if offsets is None:
        return
    a, b = args[:2]
    total = b.size(-1) if a.dim() == 3 else a.size(0) if b.dim() == 3 else a.size(1)
    offsets.copy_(torch.arange(1, offsets.numel() + 1, device=offsets.device) * total // offsets.numel())


def _with_workspace(args: Any) -> Any:
    """Give the backward of an LSTM layer the workspace of a forward."""
    numbers = args[:7]
    reverse, mode, hidden, layers, biases, train, bidirectional, batch_sizes, batch_first = args[13:22]
    with torch.enable_grad():  # without gradients the forward leaves no workspace
        out = torch.ops.aten.mkldnn_rnn_layer.default(
            *numbers, reverse, batch_sizes, mode, hidden, layers, biases, bidirectional, batch_first, train
        )
    return *args[:-1], out[-1]


def _time_once(func: Any, args: Any, kwargs: Any, cuda: bool) -> float:
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        func(*args, **kwargs)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    out = func(*args, **kwargs)
    seconds = time.perf_counter() - begin
    del out
    return seconds


def _memory_cpu(func: Any, args: Any, kwargs: Any) -> tuple[int, tuple[int, ...]]:
    """Measure a call's scratch and result bytes by the allocator's account.

    The scratch is what the kernel allocates at its peak beyond its results.
    """
    changes, out = allocations_of(func, args, kwargs)
    current = peak = 0
    for change in changes:
        current += change
        peak = max(peak, current)
    made = _made_bytes(out, args, kwargs)
    return max(0, peak - sum(made)), made


def allocations_of(func: Any, args: Any, kwargs: Any) -> tuple[list[int], Any]:
    """List what a call allocates on the CPU, and return its result.

    The list is in order; what the call frees is negative.
    """
    if torch.autograd._profiler_enabled():  # the user's profiler is on; a thread has one, so use another thread
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_watched, func, args, kwargs).result()
    return _watched(func, args, kwargs)


def _watched(func: Any, args: Any, kwargs: Any) -> tuple[list[int], Any]:
    config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
    # The legacy profiler: the newer one (Kineto, torch 2.13) takes longer and writes to the terminal.
    torch.autograd._enable_profiler_legacy(config)
    try:
        out = func(*args, **kwargs)
    finally:
        threads = torch.autograd._disable_profiler_legacy()
    return [e.cpu_memory_usage() for events in threads for e in events if e.kind() == "memory_alloc"], out


def _memory_cuda(func: Any, args: Any, kwargs: Any) -> tuple[int, tuple[int, ...]]:
    func(*args, **kwargs)  # libraries allocate a workspace at their first call, and keep it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = func(*args, **kwargs)
    torch.cuda.synchronize()
    made = _made_bytes(out, args, kwargs)
    return max(0, torch.cuda.max_memory_allocated() - before - sum(made)), made


def _made_bytes(out: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """List the bytes of every storage the call made, in result order."""
    old = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
    new = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(out)}
    return tuple(n for address, n in new.items() if address not in old)


def made_when_run(signature: CallSignature) -> tuple[int, ...]:
    """Run a call once on random numbers; list its new bytes.

    They are those of every storage that it makes.

    Raises:
        Exception: random numbers do not suit the operator.
    """
    with _undisturbing():
        args, kwargs = thaw(signature.args, _random), thaw(signature.kwargs, _random)
        return _made_bytes(signature.func(*args, **kwargs), args, kwargs)


def extent_of(spec: TensorSpec) -> int:
    """Count the elements from a tensor's first one to its last one."""
    return 1 + sum((n - 1) * s for n, s in zip(spec.size, spec.stride, strict=True)) if 0 not in spec.size else 0


def _random(spec: TensorSpec) -> Tensor:
    """Make a tensor of this spec, filled for timing.

    Floating-point numbers are random, because numbers may matter for speed, and between 0 and 1, as some operators ask
    of probabilities. Integers are zero, because they may index something.
    """
    n = extent_of(spec) + spec.beyond
    if spec.dtype in _DRAWN:
        base = torch.rand(n, device=spec.device, dtype=spec.dtype)
    elif spec.dtype.is_floating_point or spec.dtype.is_complex:
        base = torch.rand(n, device=spec.device, dtype=torch.float32).to(spec.dtype)
    else:
        base = torch.zeros(n, dtype=spec.dtype, device=spec.device)
    return base.as_strided(spec.size, spec.stride)


@contextmanager
def _undisturbing() -> Iterator[None]:
    """Leave random generators alone; disable autograd and autocast inside."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    below_autograd, no_autocast = torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast()
    with torch.random.fork_rng(devices=list(devices)), below_autograd, no_autocast:
        yield
