"""The parts of ``benchmarks/gpu.py``: networks at several budgets, the host's overhead, the batch that hides it.

A part fills a dictionary of plain data as it goes, and saves it after everything that takes long, so that what is known
stays known when it is stopped. What no longer fits into its seconds is in there as skipped, what raised as a problem.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import torch
from _gpu_device import Cpu, Cuda, Device, Peak, Step, deterministic, median_ratio
from _gpu_networks import NETWORKS, SMALL, Loss, Network, every_block_checkpointed, gpt, loss_of
from torch import Tensor, nn

import autoremat
from autoremat.demo.models import GPTConfig
from autoremat.engines.torch.world.memory_account import resident
from autoremat.program import Plan

Data = dict[str, Any]

HIDDEN: Final = 1.02
"""A step this much longer than the plain one, at most, counts as hidden behind the device."""
BUDGETS: Final = 5
SHARE: Final = 0.9
"""The largest of the budgets, as a share of the plain peak."""


class Skipped(Exception):
    """Why something was not done."""


@dataclass
class Setting:
    """How a part is run.

    Attributes:
        device: what it is run on.
        end: moment of ``time.monotonic`` at which it should be over.
        scale: factor of the batch sizes.
        planning_seconds: the longest that one plan may take.
        rounds: most rounds of timed steps.
        budgets: how many of the five budgets, those that tell most first.
        save: writes what the part has found so far.
    """

    device: Device
    end: float
    scale: float = 1.0
    planning_seconds: float = 3.0
    rounds: int = 15
    budgets: int = BUDGETS
    save: Callable[[], None] = lambda: None

    @property
    def is_dry(self) -> bool:
        """Whether this is the dry run, on the CPU."""
        return isinstance(self.device, Cpu)

    @property
    def left_seconds(self) -> float:
        """What is left of the part's time."""
        return self.end - time.monotonic()


@dataclass
class Variant:
    """One way to run the step.

    Attributes:
        loss: the callable that gives the loss.
        data: what is known of it, for the results.
        is_out: it has raised; nothing more is asked of it.
    """

    loss: Loss
    data: Data = field(default_factory=dict)
    is_out: bool = False

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What raises inside puts the variant out and is written down."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 a row of the table; the others go on
            self.data["problem"] = told(error)
            self.is_out = True


@dataclass
class Training:
    """A network on the device, and everything that is run on it: the variants share its parameters."""

    network: Network
    model: nn.Module
    inputs: tuple[Tensor, ...]
    setting: Setting
    variants: dict[str, Variant] = field(default_factory=dict)

    def step(self, variant: Variant) -> Step:
        """Forward and backward."""
        return lambda: variant.loss(*self.inputs).backward()

    def clear(self) -> None:
        """Without gradients, as a step begins."""
        self.model.zero_grad(set_to_none=True)

    def running(self) -> list[tuple[str, Variant]]:
        """The variants that have not raised so far."""
        return [(name, v) for name, v in self.variants.items() if not v.is_out]


def told(error: BaseException) -> str:
    """An error in a line, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:600]} [{where}]"


# ---- the network on the device ---------------------------------------------------------------------------------------


def placed(network: Network, setting: Setting, data: Data) -> Training:
    """The network on the device with the largest batch, up to the one that is asked for, that trains plainly there."""
    torch.manual_seed(0)
    form = torch.channels_last if network.channels_last else torch.preserve_format
    model = network.model().train().to(setting.device.name, memory_format=form)
    batch = max(1, round(network.batch * setting.scale))
    data |= {"wanted_batch": batch, "parameter_bytes": sum(p.nbytes for p in model.parameters())}
    while batch:
        inputs = tuple(
            t.to(setting.device.name, memory_format=form if t.dim() == 4 else torch.preserve_format)
            for t in network.inputs(batch)
        )
        training = Training(network, model, inputs, setting)
        if _trains(training):
            data |= {"batch": batch, "input_shapes": [list(t.shape) for t in inputs]}
            return training
        batch //= 2
    raise Skipped("a plain step with a batch of one, beside a copy of the gradients, does not fit into the free memory")


def _trains(training: Training) -> bool:
    """Whether a plain step fits, with room for a copy of the gradients and a tenth of the memory to spare."""
    free = training.setting.device.free_bytes()
    if free is None:
        return True
    fits = True
    try:
        _step_beside(training, resident(training.model) + free // 10)
    except torch.OutOfMemoryError:
        fits = False
    training.clear()
    training.setting.device.release()
    return fits


def _step_beside(training: Training, nbytes: int) -> None:
    """A plain step while so much memory is taken."""
    spare = torch.empty(nbytes, dtype=torch.uint8, device=training.setting.device.name)
    loss_of(training.network, training.model)(*training.inputs).backward()
    del spare


# ---- a network at several budgets ------------------------------------------------------------------------------------


def compare(name: str, setting: Setting, data: Data) -> None:
    """Plain, every block, and autoremat at five budgets and at the peak of every block."""
    network = (SMALL if setting.is_dry else NETWORKS)[name]
    data["network"] = network.name
    training = placed(network, setting, data)
    data["variants"] = {}
    plain = loss_of(network, training.model)
    _add(training, data, "plain", plain)
    _add(training, data, "every block", _by_blocks(training.model, plain))
    whole = _plan(training, plain)
    data |= {"floor_bytes": whole.floor_bytes, "operators": len(whole.program.ops)}
    training.variants["plain"].data["predicted_peak_bytes"] = whole.plain_peak_bytes
    _find_peak(training, "every block")
    _add_budgets(training, data, plain, whole)
    compare_bits(training, data)
    for variant in training.variants:
        _find_peak(training, variant)
    time_steps(training, setting.device.seconds)
    _take_stock(training)


def _plan(training: Training, loss: Loss) -> Plan:
    """The plan of the whole plain peak: where the floor is, and what the plain peak should be."""
    seconds = training.setting.planning_seconds
    return autoremat.plan(loss, *training.inputs, budget=1.0, timing="measure", time_limit_seconds=seconds)


def _by_blocks(model: nn.Module, plain: Loss) -> Loss:
    def loss(*inputs: Tensor) -> Tensor:
        with every_block_checkpointed(model):
            return plain(*inputs)

    return loss


def budgets_between(floor_bytes: int, plain_peak_bytes: int) -> list[int]:
    """Evenly from just above the floor to 90 % of the plain peak, or to just below it where the floor is higher."""
    margin = (plain_peak_bytes - floor_bytes) // 50
    low, high = floor_bytes + margin, int(SHARE * plain_peak_bytes)
    if high <= low:
        high = plain_peak_bytes - margin
    return [low + (high - low) * k // (BUDGETS - 1) for k in range(BUDGETS)]


def _add_budgets(training: Training, data: Data, plain: Loss, whole: Plan) -> None:
    """Autoremat at its budgets, those that tell most first; what there is no time for is skipped."""
    above = (whole.plain_peak_bytes - whole.floor_bytes) // 8  # what is made again are calls: their floor is higher
    found = budgets_between(whole.floor_bytes + above, whole.plain_peak_bytes)
    wanted = {f"budget {k + 1} of {BUDGETS}": found[k] for k in (0, 4, 2, 1, 3)[: training.setting.budgets]}
    block = training.variants["every block"].data.get("peak")
    if block is not None:
        wanted = dict(list(wanted.items())[:3]) | {"peak of every block": block["own_bytes"]} | wanted
    took = 0.0
    for name, budget_bytes in wanted.items():
        left = training.setting.left_seconds
        if left < 1.5 * took + 0.25 * (left + took * len(training.variants)):  # the rest is for measuring
            reason = f"no time left: {left:.0f} s of the part, and a plan has taken {took:.0f} s"
            data["variants"][name] = {"budget_bytes": budget_bytes, "skipped": reason}
            continue
        begin = time.monotonic()
        _add(training, data, name, _checkpointed(training, plain, budget_bytes), budget_bytes=budget_bytes)
        took = time.monotonic() - begin


def _checkpointed(training: Training, plain: Loss, budget: int | str) -> Loss:
    seconds = training.setting.planning_seconds
    return autoremat.checkpoint(lambda *inputs: plain(*inputs), budget=budget, time_limit_seconds=seconds)


def _add(training: Training, data: Data, name: str, loss: Loss, **known: Any) -> None:
    """Add a variant and run it three times: the first step records and plans, and both that and the next one check."""
    variant = training.variants[name] = Variant(loss, known)
    data["variants"][name] = variant.data
    with variant.guarded():
        begin = time.monotonic()
        for _ in range(3):
            training.clear()
            training.step(variant)()
            variant.data.setdefault("first_step_seconds", time.monotonic() - begin)
    training.clear()
    if variant.is_out:
        training.setting.device.release()
    training.setting.save()


def _find_peak(training: Training, name: str) -> None:
    """The allocator's peak of a step of a variant, unless it is known."""
    variant = training.variants[name]
    if variant.is_out or "peak" in variant.data:
        return
    with variant.guarded():
        training.clear()
        peak = training.setting.device.peak(training.step(variant), training.model, training.inputs)
        variant.data["peak"] = asdict(peak) | {"own_bytes": peak.own_bytes}
    training.clear()
    training.setting.save()


# ---- the same bits ---------------------------------------------------------------------------------------------------


def compare_bits(training: Training, data: Data) -> None:
    """Whether loss, gradients, buffers and generators of every variant are those of the plain step.

    With deterministic algorithms; whether the plain step repeats itself there, and without them, says what that means.
    """
    buffers = [b.clone() for b in training.model.buffers()]
    strict = training.network.strict
    plain = training.variants["plain"]
    data["exactness"] = {
        "under": f"torch.use_deterministic_algorithms(True, warn_only={not strict}), CUBLAS_WORKSPACE_CONFIG=:4096:8",
    }
    differs = _difference(_trace(training, plain, buffers), _trace(training, plain, buffers))
    data["exactness"]["plain_repeats_itself_without"] = not differs
    with deterministic(strict=strict):
        reference = _trace(training, plain, buffers)
        again = _difference(reference, _trace(training, plain, buffers))
        data["exactness"]["plain_repeats_itself"] = not again
        for _, variant in training.running():
            with variant.guarded():
                variant.data["differs"] = _difference(reference, _trace(training, variant, buffers))
                variant.data["same_bits"] = not variant.data["differs"]
            training.clear()
    _put_back(training.model, buffers)
    training.setting.save()


def _trace(training: Training, variant: Variant, buffers: Sequence[Tensor]) -> dict[str, Tensor]:
    """What a step from the same state leaves behind."""
    _put_back(training.model, buffers)
    training.clear()
    torch.manual_seed(1)
    loss = variant.loss(*training.inputs)
    loss.backward()
    seen = {"loss": loss.detach()}
    seen |= {f"gradient of {n}": p.grad for n, p in training.model.named_parameters() if p.grad is not None}
    seen |= {f"buffer {n}": b.clone() for n, b in training.model.named_buffers()}
    seen |= {f"generator {k}": s for k, s in enumerate(training.setting.device.generator_states())}
    return seen


def _put_back(model: nn.Module, buffers: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """The first thing that is not the same to the last bit; nothing where all are."""
    if a.keys() != b.keys():
        return f"{min(a.keys() ^ b.keys())} is there only once"
    return next((name for name in a if not _same(a[name], b[name])), "")


def _same(a: Tensor, b: Tensor) -> bool:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.equal(a.view(whole[a.itemsize]), b.view(whole[b.itemsize]))


# ---- times -----------------------------------------------------------------------------------------------------------


def time_steps(training: Training, seconds: Callable[[Step], float]) -> None:
    """Time the variants in turns, as many rounds as there is time for, at least three."""
    samples: dict[str, list[float]] = {name: [] for name, _ in training.running()}
    round_seconds = 0.0
    for k in range(training.setting.rounds + 1):
        begin = time.monotonic()
        for name, variant in _in_turn(training, k):
            with variant.guarded():
                training.clear()
                samples[name].append(seconds(training.step(variant)))
        round_seconds = time.monotonic() - begin
        if k >= 3 and training.setting.left_seconds < 2 * round_seconds:
            break
    training.clear()
    for name, variant in training.running():
        _take_times(variant.data, samples[name][1:], samples["plain"][1:])  # the first round warms up
    training.setting.save()


def _in_turn(training: Training, k: int) -> list[tuple[str, Variant]]:
    """The variants, each round from another one on, every other round backwards."""
    running = training.running()
    n = k % len(running)
    return (running[n:] + running[:n])[:: -1 if k % 2 else 1]


def _take_times(data: Data, samples: list[float], plain: list[float]) -> None:
    data["rounds"] = len(samples)
    data["median_seconds"] = statistics.median(samples)
    data["ratio"] = median_ratio(samples, plain)
    data["measured_overhead"] = data["ratio"] - 1


def _take_stock(training: Training) -> None:
    """What autoremat says of the variants that it runs."""
    for name, variant in training.variants.items():
        if name in ("plain", "every block") or variant.is_out:
            continue
        stats = autoremat.stats(variant.loss)
        counts = {n: getattr(stats, n) for n in ("calls", "planned", "deviations", "unplanned", "retries", "differing")}
        variant.data |= counts | {"reruns_per_step": stats.reruns / max(1, stats.calls)}
        if stats.plan is None:
            continue
        variant.data |= {
            "predicted_peak_bytes": stats.plan.peak_bytes,
            "predicted_overhead": stats.plan.overhead,
            "lower_bound": stats.plan.lower_bound,
            "solver": stats.plan.solver,
            "recorded": stats.plan.program.recorded,
            "forward_operators": len(stats.plan.program.forward),
        }
    for variant in training.variants.values():
        _compare_peaks(variant.data)
    training.setting.save()


def _compare_peaks(data: Data) -> None:
    """The measured peak beside the plan's and the budget."""
    peak, predicted = data.get("peak"), data.get("predicted_peak_bytes")
    if peak is None or predicted is None:
        return
    data["above_predicted_bytes"] = peak["own_bytes"] - predicted
    data["allocated_above_predicted_bytes"] = peak["allocated_bytes"] - predicted
    if "budget_bytes" in data:
        data["within_budget"] = peak["own_bytes"] <= data["budget_bytes"]


# ---- what the host takes ---------------------------------------------------------------------------------------------


def host(setting: Setting, data: Data) -> None:
    """What following a plan costs where the host is the bottleneck: microseconds per step and per operator.

    Everything kept needs no follower; a budget one byte below the plain peak does, and keeps all but a trifle.
    """
    config = GPTConfig(blocks=1 if setting.is_dry else 12, width=64, heads=4, context=64)
    network = gpt(f"GPT of width 64, blocks: {config.blocks}, 64 tokens, float32", config, 8, None)
    data |= {"network": network.name, "variants": {}}
    training = placed(network, replace(setting, scale=1.0), data)
    plain = loss_of(network, training.model)
    _add(training, data, "plain", plain)
    _add(training, data, "every block", _by_blocks(training.model, plain))
    _find_peak(training, "every block")
    whole = _plan(training, plain)
    at_block = training.variants["every block"].data["peak"]["own_bytes"]
    peak = whole.plain_peak_bytes
    for name, budget_bytes, budget in (
        ("everything kept", peak, "100%"),
        ("one byte below the plain peak", peak - 1, peak - 1),
        ("peak of every block", at_block, at_block),
    ):
        _add(training, data, name, _checkpointed(training, plain, budget), budget_bytes=budget_bytes)
    for name in training.variants:
        _find_peak(training, name)
    time_steps(training, setting.device.host_seconds)
    _take_stock(training)
    _take_microseconds(training.variants, len(whole.program.forward), len(whole.program.ops))


def _take_microseconds(variants: dict[str, Variant], forward: int, whole: int) -> None:
    """What a variant takes more than the plain step, by operator that is run for the first time."""
    plain = variants["plain"].data.get("median_seconds")
    for variant in variants.values():
        if plain is not None and "median_seconds" in variant.data:
            more = (variant.data["median_seconds"] - plain) * 1e6
            variant.data |= {
                "more_microseconds_per_step": more,
                "more_microseconds_per_forward_operator": more / forward,
                "more_microseconds_per_operator": more / whole,
            }


def hiding(setting: Setting, data: Data) -> None:
    """The batch from which on following a plan that keeps as good as everything takes under 2 % more.

    The smallest batch that is measured, such that no larger one that is measured takes more.
    """
    sizes = (1, 32, 2, 32) if setting.is_dry else (12, 768, 12, 128)
    config = GPTConfig(*sizes)
    data |= {
        "network": f"GPT of width {config.width}, blocks: {config.blocks}, {config.context} tokens, bf16",
        "hidden_below": HIDDEN,
        "batches": {},
    }
    for batch in (1, 2) if setting.is_dry else (1, 2, 4, 8, 16, 32, 64):
        row: Data = {}
        data["batches"][str(batch)] = row
        if setting.left_seconds < 5 and not setting.is_dry:
            row["skipped"] = f"no time left: {setting.left_seconds:.0f} s of the part"
            continue
        try:
            _ratio_when_kept(gpt("", config, batch), setting, row)
        except Exception as error:  # noqa: BLE001 a row of the table
            row["problem"] = told(error)
        setting.save()
    data["hidden_from_batch"] = hidden_from({int(b): r["ratio"] for b, r in data["batches"].items() if "ratio" in r})


def hidden_from(ratios: dict[int, float]) -> int | None:
    """The smallest batch from which on every ratio is below ``HIDDEN``."""
    found = None
    for batch in sorted(ratios, reverse=True):
        if ratios[batch] >= HIDDEN:
            break
        found = batch
    return found


def _ratio_when_kept(network: Network, setting: Setting, row: Data) -> None:
    variants: Data = {}
    training = placed(network, replace(setting, scale=1.0), row)
    plain = loss_of(network, training.model)
    held = {"variants": variants}
    _add(training, held, "plain", plain)
    budget = _plan(training, plain).plain_peak_bytes - 1
    _add(training, held, "kept", _checkpointed(training, plain, budget), budget_bytes=budget)
    training.setting.end = min(setting.end, time.monotonic() + 0.2 * max(0.0, setting.left_seconds))
    time_steps(training, setting.device.seconds)
    _take_stock(training)
    row |= {name: variants["kept"].get(name) for name in ("ratio", "reruns_per_step", "predicted_overhead", "problem")}
    row |= {"plain_seconds": variants["plain"].get("median_seconds")}
    for name in [n for n, value in row.items() if value is None]:
        del row[name]


# ---- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part: what it does, how long it may take without the start of its process, whether a dry run has it."""

    name: str
    run: Callable[[Setting, Data], None]
    seconds: float
    is_dry: bool = True


def _network(name: str, seconds: float) -> Part:
    return Part(name, lambda setting, data: compare(name, setting, data), seconds, name in SMALL)


PARTS: Final = (
    _network("gpt2-medium", 55),
    Part("host", host, 25),
    _network("llama-1b-2k", 50),
    _network("resnet50", 45),
    _network("unet", 35),
    _network("llama-1b-8k", 45),
    Part("hiding", hiding, 40),
    _network("gpt2-large", 60),
    _network("llama-300m-2k", 35),
    _network("llama-300m-8k", 35),
)
"""What tells most comes first: the time may not be enough for all."""


def device(*, dry: bool) -> Device:
    """The device to measure on."""
    return Cpu() if dry else Cuda()


__all__ = ["PARTS", "Part", "Peak", "Setting", "Skipped", "budgets_between", "compare", "device", "hidden_from"]
