"""The zoo: do real architectures train within a budget, bit for bit as without?

For every model of ``zoo_models``, in a process of its own: three plain steps of SGD, then three with autoremat at 60 %
of the plain peak, three at the floor and three at 1.1 times that; losses, gradients, parameters, buffers and random
generators must be equal to the last bit, and the last step must stay within the budget by the allocator's account. The
first step, which has no plan yet, is measured, too. Where the library has a switch
for checkpointing, autoremat plans beforehand for the peak that the switch reaches, and both are timed beside plain
training, in turns.

Run: ``python benchmarks/zoo.py --results docs/zoo.json --page docs/zoo.md``; libraries: ``pip install -e '.[zoo]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.metadata
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _side_by_side import keep_memory, seconds_of
from torch import Tensor, nn
from zoo_models import ZOO, Specimen, tell_torchvision_of_its_operators

import autoremat
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.show.text import format_bytes

SHARE = 0.6
ABOVE = 1.1
ABOVE_FLOOR = f"{ABOVE} x floor"
STEPS = 3
_FOLDERS = re.compile(r"(?:/[^/\s]+)+/")
"""Where files lie is the machine's affair."""


@dataclass
class Trial:
    """Three steps with autoremat at one budget.

    Attributes:
        budget_bytes: what it was given.
        predicted_bytes: the plan's peak.
        measured_bytes: the peak of one step by the allocator's account.
        same: losses, gradients, parameters, buffers and generators are those of plain training.
        overhead: extra time that the plan expects, as a fraction.
        reruns: operators run again in all steps.
        deviations: steps that left the path.
        warned: what autoremat warned of.
        different: the first thing that differs from plain training.
        step: the step, counted from 1, whose peak was measured.
        first_bytes: the measured peak of the first step, which has no plan yet.
    """

    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    same: bool
    overhead: float
    reruns: int
    deviations: int
    warned: list[str]
    different: str = ""
    step: int = STEPS
    first_bytes: int = 0

    @property
    def within(self) -> bool:
        """Whether the budget was kept."""
        return self.measured_bytes <= self.budget_bytes


@dataclass
class Race:
    """The library's switch and autoremat at the peak that the switch reaches; extra time as a fraction of plain."""

    switch_bytes: int = 0
    floor_bytes: int = 0
    measured_bytes: int = 0
    switch_extra: float = 0.0
    autoremat_extra: float = 0.0
    plain_seconds: float = 0.0
    problem: str = ""
    planned_anew: bool = False
    """The plan that was made beforehand, on fake tensors, was not for the real step."""


@dataclass
class Result:
    """What was found out about one model."""

    name: str
    library: str
    kind: str
    recorded: str = ""
    ops: int = 0
    plain_bytes: int = 0
    predicted_plain_bytes: int = 0
    floor_bytes: int = 0
    trials: dict[str, Trial] = field(default_factory=dict)
    race: Race | None = None
    seconds: float = 0.0
    problem: str = ""


@dataclass
class Trace:
    """What three steps have left behind, to be compared bit for bit."""

    tensors: dict[str, Tensor]
    peak_bytes: int
    first_bytes: int


Step = Callable[[], Tensor]


def main() -> None:
    """Run all models, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", help="a name, or a part of names, such as 'timm: vit'; without: all that have no results yet"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant; 0 skips the race")
    parser.add_argument("--results", type=Path, help="JSON file of results, added to if it is there")
    parser.add_argument("--page", type=Path, help="Markdown page to write")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        options.results.write_text(json.dumps(asdict(examine(ZOO[options.one], options.rounds))))
        return
    results = _stored(options.results)
    keys = [f"{s.library}: {s.name}" for s in ZOO]
    for key in _wanted(keys, options.only, results):
        results[key] = _in_process(keys.index(key), options.rounds, options.timeout)
        print(_line(results[key]), flush=True)
        if options.results:
            options.results.write_text(json.dumps(results, indent=1))
    if options.page:
        options.page.write_text(page([results[key] for key in keys if key in results]))


def _wanted(keys: list[str], only: str | None, results: dict[str, Any]) -> list[str]:
    """The models to run: those named, or all that have no results yet."""
    if only is None:
        return [key for key in keys if not results.get(key, {}).get("trials")]
    return [only] if only in keys else [key for key in keys if only.lower() in key.lower()]


def _stored(path: Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path is not None and path.exists() else {}


def _in_process(i: int, rounds: int, timeout: float) -> dict[str, Any]:
    """One model in a process of its own: a crash or an endless loop is its own affair."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--one", str(i), "--rounds", str(rounds), "--results", str(out)]
        problem = ""
        try:
            done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
            if done.returncode:
                problem = f"process ended with {done.returncode}: {done.stderr.strip()[-400:]}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {timeout:.0f} s"
        if out.exists():
            return json.loads(out.read_text())
        s = ZOO[i]
        return asdict(Result(s.name, s.library, s.kind, problem=problem))


# ---- one model -------------------------------------------------------------------------------------------------------


def examine(specimen: Specimen, rounds: int) -> Result:
    """Everything about one model; never raises."""
    result = Result(specimen.name, specimen.library, specimen.kind)
    begin = time.perf_counter()
    try:
        tell_torchvision_of_its_operators()
        _examine(specimen, rounds, result)
    except Exception as error:  # noqa: BLE001 what does not work is a row of the table
        result.problem = f"{type(error).__name__}: {str(error)[:400]}"
        traceback.print_exc()
    result.seconds = time.perf_counter() - begin
    return result


def _examine(specimen: Specimen, rounds: int, result: Result) -> None:
    torch.manual_seed(0)
    model = specimen.model().train()
    inputs = specimen.inputs()
    plain = trace(*_step(specimen, copy.deepcopy(model), inputs))
    result.plain_bytes = plain.peak_bytes
    _try(specimen, model, inputs, plain, int(SHARE * plain.peak_bytes), "60 %", result)
    if result.floor_bytes:
        _try(specimen, model, inputs, plain, result.floor_bytes, "floor", result)
        _try(specimen, model, inputs, plain, int(ABOVE * result.floor_bytes), ABOVE_FLOOR, result)
    if specimen.switch is not None and rounds:
        try:
            result.race = race(specimen, model, inputs, rounds)
        except Exception as error:  # noqa: BLE001 a row of the table, too
            result.race = Race(problem=f"beside the switch: {type(error).__name__}: {str(error)[:400]}")


def _try(
    specimen: Specimen, model: nn.Module, inputs: Any, plain: Trace, budget: int, label: str, result: Result
) -> None:
    """A trial of autoremat; an infeasible one says where the floor is."""
    twin = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = autoremat.checkpoint(_loss(specimen, twin), budget=budget)
        try:
            found = trace(twin, inputs, lambda: wrapped(**inputs))
        except autoremat.InfeasibleBudget as error:
            result.floor_bytes = error.floor_bytes
            return
    stats = autoremat.stats(wrapped)
    if stats.plan is not None:
        result.floor_bytes, result.predicted_plain_bytes = stats.plan.floor_bytes, stats.plan.plain_peak_bytes
        result.recorded, result.ops = stats.plan.program.recorded, len(stats.plan.program.ops)
    different = first_difference(plain, found)
    if different and first_difference(plain, trace(*_step(specimen, copy.deepcopy(model), inputs))):
        different += " (plain training differs from run to run, too)"
    result.trials[label] = Trial(
        budget, stats.plan.peak_bytes if stats.plan else 0, found.peak_bytes, not different,
        stats.plan.overhead if stats.plan else 0.0, stats.reruns, stats.deviations,
        sorted({_FOLDERS.sub("", str(w.message))[:300] for w in caught if "autoremat" in str(w.message)}), different,
        first_bytes=found.first_bytes,
    )  # fmt: skip


def _loss(specimen: Specimen, model: nn.Module) -> Callable[..., Tensor]:
    return lambda **inputs: specimen.loss(model(**inputs))


def _step(specimen: Specimen, model: nn.Module, inputs: Any) -> tuple[nn.Module, Any, Step]:
    loss = _loss(specimen, model)
    return model, inputs, lambda: loss(**inputs)


def _backward(loss: Step) -> Callable[[], None]:
    return lambda: loss().backward()


def trace(model: nn.Module, inputs: Any, loss: Step) -> Trace:
    """Train a few steps; the first and the last one under the allocator's account."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    seen: dict[str, Tensor] = {}
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
    peaks: dict[int, int] = {}
    for k in range(STEPS):
        optimizer.zero_grad()

        def step(k: int = k) -> None:
            value = loss()
            value.backward()
            seen[f"loss of step {k}"] = value.detach().clone()

        if k in (0, STEPS - 1):
            peaks[k] = account(step, resident(model, *tensors)).peak_bytes
        else:
            step()
        for name, p in model.named_parameters():
            if p.grad is not None:
                seen[f"gradient of {name} in step {k}"] = p.grad.clone()
        optimizer.step()
    seen |= {f"{name} after the last step": t.detach().clone() for name, t in model.state_dict().items()}
    seen["random generator"] = torch.get_rng_state()
    seen["generators of Python and NumPy"] = torch.tensor([random.getrandbits(32), np.random.randint(1 << 31)])
    return Trace(seen, peaks[STEPS - 1], peaks[0])


def first_difference(a: Trace, b: Trace) -> str:
    """Name of the first tensor that is not the same to the last bit."""
    if a.tensors.keys() != b.tensors.keys():
        return f"{min(a.tensors.keys() ^ b.tensors.keys())} is there only once"
    return next((name for name, t in a.tensors.items() if not _same(t, b.tensors[name])), "")


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


# ---- beside the library's switch -------------------------------------------------------------------------------------


def race(specimen: Specimen, model: nn.Module, inputs: Any, rounds: int) -> Race:
    """Extra time of the switch, and of autoremat at the peak that the switch reaches."""
    assert specimen.switch is not None
    switched = copy.deepcopy(model)
    specimen.switch(switched)
    peak = trace(*_step(specimen, switched, inputs)).peak_bytes
    planned = copy.deepcopy(model)
    loss = _loss(specimen, planned)
    try:  # planned beforehand: a training has the plan of a tenth of a second for its first steps only
        plan = autoremat.plan(loss, **inputs, budget=peak, timing="measure")
        wrapped = autoremat.checkpoint(loss, plan=plan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measured = trace(planned, inputs, lambda: wrapped(**inputs)).peak_bytes
    except autoremat.InfeasibleBudget as error:
        return Race(peak, error.floor_bytes, problem=f"the switch's peak, {format_bytes(peak)}, is below the floor")
    steps = {
        "plain": _step(specimen, copy.deepcopy(model), inputs),
        "switch": _step(specimen, switched, inputs),
        "autoremat": (planned, inputs, lambda: wrapped(**inputs)),
    }
    keep_memory()
    seconds = seconds_of({name: (model, _backward(loss)) for name, (model, _, loss) in steps.items()}, rounds)
    ratio = {k: statistics.median(x / p for x, p in zip(s, seconds["plain"], strict=True)) - 1
             for k, s in seconds.items()}  # fmt: skip
    return Race(
        peak, plan.floor_bytes, measured, ratio["switch"], ratio["autoremat"],
        statistics.median(seconds["plain"]), planned_anew=any("planned by itself" in str(w.message) for w in caught),
    )  # fmt: skip


def _line(r: dict[str, Any]) -> str:
    """One line for the terminal."""
    cells = [f"{r['library'][:14]:14s} {r['name'][:26]:26s} {r['recorded']:4s} {r['seconds']:4.0f}s"]
    cells.append(f"plain {r['plain_bytes'] / 1e6:6.1f} MB (predicted {r['predicted_plain_bytes'] / 1e6:6.1f})")
    for label, t in r["trials"].items():
        verdict = "same" if t["same"] else f"DIFFERS: {t['different']}"
        kept = "" if t["measured_bytes"] <= t["budget_bytes"] else " OVER BUDGET"
        sizes = "/".join(f"{t[k] / 1e6:.1f}" for k in ("budget_bytes", "predicted_bytes", "measured_bytes"))
        cells.append(f"{label}: {sizes} {t['overhead']:.1%} {verdict}{kept} {t['warned'] or ''}")
    if r["race"]:
        race = r["race"]
        cells.append(race["problem"] or f"switch {race['switch_extra']:.1%}, autoremat {race['autoremat_extra']:.1%}")
    return " | ".join([*cells, r["problem"]])


# ---- the page --------------------------------------------------------------------------------------------------------

PAGE = """# The zoo

Models of the libraries that people train with, as these ship them, small and randomly initialised. Every row is three
steps of SGD in a process of its own. *Same bits*: losses and gradients of every step, and parameters, buffers and
random generators after the last one, are those of plain training. Peaks are the allocator's own account of step {step}.
The budget is 60 % of the plain peak, or the *floor*, the smallest budget for which autoremat has a plan, where that is
higher; the last column is what a step with the floor as its budget took.

`python benchmarks/zoo.py --results docs/zoo.json --page docs/zoo.md` makes this page
({versions};
{date}; CPU, one thread).

{summary}

## Budgets

{budgets}

## Beside the library's own switch

Extra time over plain training, of `gradient_checkpointing_enable()`, `enable_gradient_checkpointing()` or
`set_grad_checkpointing()`, and of autoremat with the peak that this switch reaches as its budget: steps in turns,
median of the ratios, on a machine that did other work at the same time; the C allocator keeps what it has got.
*Ratio* is autoremat's extra time over the switch's.

{races}

## What does not work, and why

Not run: {missing}.

{problems}
"""
PACKAGES = ("torch", "transformers", "diffusers", "timm", "segmentation_models_pytorch", "torch_geometric",
            "x_transformers", "peft")  # fmt: skip


BUDGET_COLUMNS = ("model", "kind", "recorded", "ops", "plain", "budget", "predicted", "measured", "overhead",
                  "same bits", "floor", "at the floor")  # fmt: skip
RACE_COLUMNS = ("model", "plain step", "peak of the switch", "autoremat's peak", "switch", "autoremat", "ratio")


def page(results: list[dict[str, Any]]) -> str:
    """The page of the docs."""
    races = [r for r in results if r["race"] and not r["race"]["problem"]]
    ran = {(r["library"], r["name"]) for r in results}
    return PAGE.format(
        versions=", ".join(_versions()),
        date=time.strftime("%Y-%m-%d"),
        step=" or ".join(str(k) for k in sorted({t["step"] for r in results for t in r["trials"].values()})),
        summary=_summary(results, races),
        budgets=_table(BUDGET_COLUMNS, map(_budget_row, results)),
        races=_table(RACE_COLUMNS, map(_race_row, races)),
        missing=", ".join(f"{s.name} ({s.library})" for s in ZOO if (s.library, s.name) not in ran) or "none",
        problems="\n".join(f"- **{r['name']}** ({r['library']}): {text}" for r in results if (text := _trouble(r)))
        or "Nothing of the above.",
    )


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _main_trial(r: dict[str, Any]) -> dict[str, Any] | None:
    """That at 60 %, or at the floor where that is higher."""
    return r["trials"].get("60 %") or r["trials"].get("floor")


def _budget_row(r: dict[str, Any]) -> list[str]:
    name = f"{r['name']} ({r['library']})"
    t, floor = _main_trial(r), r["trials"].get("floor")
    if t is None:
        return [name, r["kind"], r["recorded"] or "-", *["-"] * 9]
    sizes = [format_bytes(n) for n in (r["plain_bytes"], t["budget_bytes"], t["predicted_bytes"], t["measured_bytes"])]
    at_floor = f"{format_bytes(floor['measured_bytes'])}, {'same' if floor['same'] else 'differs'}" if floor else "-"
    return [name, r["kind"], r["recorded"], str(r["ops"]), *sizes, f"{t['overhead']:.1%}",
            "yes" if t["same"] else "no", format_bytes(r["floor_bytes"]), at_floor]  # fmt: skip


def _race_row(r: dict[str, Any]) -> list[str]:
    race = r["race"]
    return [
        f"{r['name']} ({r['library']})", f"{race['plain_seconds'] * 1e3:.0f} ms", format_bytes(race["switch_bytes"]),
        format_bytes(race["measured_bytes"]), f"{race['switch_extra']:.1%}", f"{race['autoremat_extra']:.1%}",
        f"{_ratio(race):.2f}",
    ]  # fmt: skip


def _ratio(race: dict[str, Any]) -> float:
    return race["autoremat_extra"] / race["switch_extra"] if race["switch_extra"] > 0 else float("nan")


def _trouble(r: dict[str, Any]) -> str:
    """What is wrong with a model's result, in words; "" if nothing is."""
    found = [r["problem"]] if r["problem"] else []
    for label, t in r["trials"].items():
        if not t["same"]:
            found.append(f"at {label}: {t['different']} differs from plain training")
        if t["measured_bytes"] > t["budget_bytes"]:
            found.append(f"at {label}: {t['measured_bytes'] - t['budget_bytes']:,} bytes over the budget")
        if label != "floor" and t.get("first_bytes", 0) > t["budget_bytes"]:
            found.append(f"at {label}: first step {t['first_bytes'] / t['budget_bytes'] - 1:.1%} over the budget")
        found += [f"at {label}: {w.removeprefix('autoremat: ').split(';')[0]}" for w in t["warned"]]
    if "60 %" not in r["trials"] and "floor" in r["trials"]:
        found.append(f"60 % of the plain peak is below the floor, {r['floor_bytes'] / r['plain_bytes']:.0%}")
    if r["race"] and r["race"]["problem"]:
        found.append(r["race"]["problem"])
    if r["race"] and r["race"].get("planned_anew"):
        found.append("beside the switch: the plan made beforehand was of another path, so the first step was planned")
    return "; ".join(found)


def _summary(results: list[dict[str, Any]], races: list[dict[str, Any]]) -> str:
    by_label = {
        label: [t for r in results if (t := r["trials"].get(label))] for label in ("60 %", "floor", ABOVE_FLOOR)
    }
    wrong = sum(not t["same"] for trials in by_label.values() for t in trials)
    lines = [f"{len(results)} of {len(ZOO)} models have been run; {wrong} gave other bits than plain training."]
    for label, trials in by_label.items():
        good = sum(t["same"] and t["measured_bytes"] <= t["budget_bytes"] for t in trials)
        lines.append(f"Budget {label}: {len(trials)} had a plan, {good} were the same to the last bit and within it.")
    first = [t for label in ("60 %", ABOVE_FLOOR) for t in by_label[label] if t.get("first_bytes")]
    if first:
        good = sum(t["first_bytes"] <= t["budget_bytes"] for t in first)
        lines.append(f"The first step, which has no plan yet, was within the budget in {good} of {len(first)} trials.")
    if races:
        ratios = [_ratio(r["race"]) for r in races]
        faster = sum(r["race"]["autoremat_extra"] < r["race"]["switch_extra"] for r in races)
        lines.append(
            f"{len(races)} with a switch: autoremat takes less extra time in {faster}; median ratio "
            f"{statistics.median(x for x in ratios if x == x):.2f}."
        )
    return " ".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    main()
