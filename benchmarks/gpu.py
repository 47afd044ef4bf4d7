"""What only a CUDA device can tell, in one command: the tests that need one, then networks at five budgets.

GPT-2 medium and large, Llama shapes at 2,048 and 8,192 tokens, ResNet-50 and a U-Net: plain, with
``torch.utils.checkpoint`` around every block, and with autoremat from just above the floor to 90 % of the plain peak.
Predicted beside measured peak and extra time, steps taking turns; whether all bits are those of plain training; what
the host takes to follow a plan, and from which batch on that hides behind the device.

Run: ``make gpu``, or ``python benchmarks/gpu.py --tests``; ``--dry-run`` is the same on the CPU with small shapes.
Every part has its seconds and a process of its own; what does not fit or fails is in the results, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Final

# Without it cuBLAS refuses to be deterministic; read when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from _gpu_parts import PARTS, Data, Part, Setting, Skipped, device, told
from _side_by_side import keep_memory

from autoremat.show.text import format_bytes

ROOT: Final = Path(__file__).resolve().parents[1]
MARK: Final = "pytest.mark.gpu"
"""What files with tests for a device have in them."""
START_SECONDS: Final = 12.0
"""What the process of a part may take beside the part: imports, the device's context, the end."""
LEAST_SECONDS: Final = 15.0
"""A part that would get less is not begun."""
COMPARED: Final = {
    "predicted_peak_bytes": "the plan's peak: parameters, buffers, inputs, gradients, activations, scratch of kernels",
    "peak.allocated_bytes": "torch.cuda.max_memory_allocated() after one step (forward and backward, gradients None "
    "before it, no optimizer), statistics reset right before it, nothing subtracted; the variants share the parameters "
    "and nothing else of this process is on the device",
    "peak.requested_bytes": "the same without the allocator's rounding (memory_stats: requested_bytes.all.peak)",
    "peak.others_bytes": "requested before the step and none of parameters, buffers, inputs: cuBLAS workspaces, say",
    "peak.own_bytes": "requested_bytes - others_bytes: what the plan predicts",
    "above_predicted_bytes": "own_bytes - predicted_peak_bytes",
    "ratio": "median over the rounds of a variant's seconds over the plain step's in the same round, by CUDA events; "
    "in the part 'host' by the host's clock, until the device is done",
    "same_bits": "loss, gradients, buffers, generator states are the plain step's, both under deterministic algorithms",
}
"""What the figures mean, for the results."""


def main() -> int:
    """Run everything, or one part of it."""
    options = _options()
    if not options.dry_run and not torch.cuda.is_available():
        print("No CUDA device that this torch can use; `--dry-run` runs the same on the CPU, with small shapes.")
        return 2
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.part is not None:
        part = next(p for p in PARTS if p.name == options.part)
        run_part(part, _setting(options, options.seconds), lambda data: _write(options.results, data))
        return 0
    return _run_all(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("build/gpu.json"), help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=460.0, help="for everything, tests included")
    parser.add_argument("--tests", action="store_true", help="run the tests marked gpu first")
    parser.add_argument("--tests-seconds", type=float, default=140.0, help="the most that these may take")
    parser.add_argument(
        "--parts", default="*", help="patterns of names, with commas between: " + ", ".join(p.name for p in PARTS)
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of the batch sizes, for devices with less memory"
    )
    parser.add_argument("--budgets", type=int, default=5, help="how many of the five budgets")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument(
        "--one-process", action="store_true", help="all parts in this process; a dry run does so anyway"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_all(options: argparse.Namespace) -> int:
    """The tests, then part by part, results written after each; 1 if a test has failed or a part had a problem."""
    begin = time.monotonic()
    results = header(options)
    if options.tests:
        results["tests"] = run_tests(options.tests_seconds, dry=options.dry_run)
        print(_tests_line(results["tests"]), flush=True)
    results["parts"] = {}
    for part in PARTS:
        if not _is_wanted(part, options):
            continue
        left = options.seconds - (time.monotonic() - begin)
        results["parts"][part.name] = _run(part, left, options)
        results["seconds"] = time.monotonic() - begin
        _write(options.results, results)
        print(f"\n{table(part.name, results['parts'][part.name])}", flush=True)
    print(f"\n{_device_line(results)}\n{options.results}: written in {results.get('seconds', 0.0):.0f} s")
    return int(has_problem(results))


def _is_wanted(part: Part, options: argparse.Namespace) -> bool:
    named = any(fnmatch.fnmatch(part.name, pattern) for pattern in options.parts.split(","))
    return named and (part.is_dry or not options.dry_run)


def _run(part: Part, left: float, options: argparse.Namespace) -> Data:
    """A part within its seconds, or why not."""
    alone = not (options.one_process or options.dry_run)
    start = START_SECONDS if alone else 0.0
    if left < LEAST_SECONDS + start:
        return {
            "skipped": f"{left:.0f} s are left of {options.seconds:.0f}, and it asks for {part.seconds + start:.0f}"
        }
    seconds = left - start if options.dry_run else min(part.seconds, left - start)  # a CPU takes what it takes
    if alone:
        return in_process(part, seconds, options)
    data: Data = {}
    run_part(part, _setting(options, seconds), data.update)
    return data


def _setting(options: argparse.Namespace, seconds: float) -> Setting:
    setting = Setting(device(dry=options.dry_run), time.monotonic() + seconds, options.scale)
    setting.budgets = options.budgets
    if options.dry_run:
        keep_memory()
        torch.set_num_threads(1)
        setting.planning_seconds, setting.rounds = 0.2, 1
    return setting


def run_part(part: Part, setting: Setting, save: Callable[[Data], object]) -> None:
    """Run a part in this process, whatever it raises, and save what it has found."""
    data: Data = {"asked_seconds": part.seconds}
    begin = time.monotonic()
    setting.save = lambda: save(data)
    try:
        part.run(setting, data)
    except Skipped as reason:
        data["skipped"] = str(reason)
    except Exception as error:  # noqa: BLE001 a row of the results; the other parts go on
        data["problem"] = told(error)
    data["took_seconds"] = time.monotonic() - begin
    save(data)


def in_process(part: Part, seconds: float, options: argparse.Namespace) -> Data:
    """A part in a process of its own, which is ended when its time is over; what it has saved by then counts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", part.name, "--results", str(out), "--seconds", str(seconds)]
        command += ["--scale", str(options.scale), "--budgets", str(options.budgets)]
        command += [*(["--dry-run"] if options.dry_run else [])]
        problem = ""
        try:
            limit = seconds + START_SECONDS
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True, check=False)
            if done.returncode:
                problem = f"its process ended with {done.returncode}: {done.stderr.strip()[-600:]}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit:.0f} s; what it had found by then is here"
        data: Data = json.loads(out.read_text()) if out.exists() else {"asked_seconds": part.seconds}
    return data | ({"problem": problem} if problem else {})


def _write(path: Path, data: Data) -> None:
    """Write the file in one go: whoever reads it meanwhile sees the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1))
    new.replace(path)


# ---- what it was run on ----------------------------------------------------------------------------------------------


def header(options: argparse.Namespace) -> Data:
    """Date, device, versions, commit, options: what the figures belong to."""
    return {
        "format": "autoremat-gpu",
        "version": 1,
        "dry_run": options.dry_run,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device(dry=options.dry_run).describe(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": {"commit": _git("rev-parse", "HEAD"), "changed": bool(_git("status", "--porcelain"))},
        "options": {name: getattr(options, name) for name in ("seconds", "tests", "scale", "parts", "budgets")},
        "compared": COMPARED,
    }


def _git(*arguments: str) -> str | None:
    """What git says; None where there is no repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()
    return None


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_files() -> list[str]:
    """The files that have tests marked ``gpu``: nothing else is imported, so nothing else has to be installed."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in found if MARK in p.read_text()]


def run_tests(seconds: float, *, dry: bool = False) -> Data:
    """Run the tests marked ``gpu``; those that are not done in time are missing."""
    marks = "gpu and not slow"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junitxml={out}", *test_files()]
        command += ["-W", "ignore:Unknown config option"]  # of plugins that are not there
        command += ["--collect-only"] if dry else []
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        running = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, stdout=sys.stderr)
        stopped = not _ended(running, seconds)
        data = _summary(out) if out.exists() else {}
    reason = f"stopped after {seconds:.0f} s" if stopped else ""
    return {"command": f"pytest -m '{marks}'", "exit_code": running.returncode, "stopped": reason} | data


def _ended(running: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it ends by itself in time; otherwise it is asked to, so that it still writes its report."""
    try:
        running.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)
    try:
        running.wait(15)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
    return False


def _summary(report: Path) -> Data:
    """Counts, and every failure with its text, of a report in JUnit's format."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [(c, f) for c in cases for f in c if f.tag in ("failure", "error")]
    skipped = [(c, f) for c in cases for f in c if f.tag == "skipped"]
    return {
        "run": len(cases) - len(skipped),
        "failed": [
            {"name": _name(c), "text": f"{f.get('message', '')[:400]}\n{(f.text or '')[-1500:]}"} for c, f in bad
        ],
        "skipped": [{"name": _name(c), "reason": f.get("message", "")} for c, f in skipped],
        "seconds": {_name(c): float(c.get("time", 0)) for c in cases},
    }


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def has_problem(results: Data) -> bool:
    """Whether a test has failed, something raised, a budget was not kept, or bits are not plain training's."""
    tests = results.get("tests", {})
    if tests.get("failed") or tests.get("exit_code"):
        return True
    return any("problem" in part or any(map(_is_bad, _rows(part))) for part in results["parts"].values())


def _rows(part: Data) -> list[Data]:
    """What is below a part, without torch's own checkpointing, under which batch norm updates its statistics twice."""
    variants = [row for name, row in part.get("variants", {}).items() if name != "every block"]
    return [*variants, *part.get("batches", {}).values()]


def _is_bad(row: Data) -> bool:
    return "problem" in row or not row.get("within_budget", True) or not row.get("same_bits", True)


# ---- the tables ------------------------------------------------------------------------------------------------------


def _device_line(results: Data) -> str:
    where = results["device"]
    commit = (results["git"]["commit"] or "unknown commit")[:12] + (" (changed)" if results["git"]["changed"] else "")
    driver = f", driver {where['driver']}" if where["driver"] else ""
    return f"{results['date']}  {where['name']}{driver}, torch {results['torch']}, {commit}"


def _tests_line(tests: Data) -> str:
    failed = [f["name"] for f in tests.get("failed", ())]
    words = [
        f"tests marked gpu: {tests.get('run', 0)} run, {len(failed)} failed, {len(tests.get('skipped', ()))} skipped"
    ]
    return "\n  ".join([*words, *filter(None, [tests["stopped"]]), *failed])


def table(name: str, part: Data) -> str:
    """A part for the terminal."""
    lines = [f"== {name}: {part.get('network', '')}" + (f", batch {part['batch']}" if "batch" in part else "")]
    lines += [f"   {key}: {part[key]}" for key in ("skipped", "problem") if key in part]
    if part.get("variants"):
        lines += [
            f"   {'':30s}{'budget':>10s}{'predicted':>11s}{'measured':>10s}{'allocated':>11s}{'step':>11s}"
            f"{'extra':>8s}{'predicted':>10s}{'us/op':>7s}  bits"
        ]
        lines += [_row(variant, data) for variant, data in part["variants"].items()]
    lines += [_batch_row(batch, row) for batch, row in part.get("batches", {}).items()]
    if "hidden_from_batch" in part:
        lines.append(f"   hidden from batch: {part['hidden_from_batch']}")
    return "\n".join(lines)


def _row(name: str, data: Data) -> str:
    if "skipped" in data or "problem" in data:
        return f"   {name:30s}{data.get('skipped') or data['problem']}"
    peak = data.get("peak", {})
    budget = data.get("budget_bytes", "")
    cells = [
        f"{budget if isinstance(budget, str) else format_bytes(budget):>10s}",
        f"{_bytes(data.get('predicted_peak_bytes')):>11s}",
        f"{_bytes(peak.get('own_bytes')):>10s}",
        f"{_bytes(peak.get('allocated_bytes')):>11s}",
        f"{_number(data.get('median_seconds'), 1e3, '.2f', ' ms'):>11s}",
        f"{_number(data.get('measured_overhead'), 100, '.1f', ' %'):>8s}",
        f"{_number(data.get('predicted_overhead'), 100, '.1f', ' %'):>10s}",
        f"{_number(data.get('more_microseconds_per_operator'), 1, '.1f'):>7s}",
    ]
    same = data.get("same_bits")
    bits = "" if same is None else "same" if same else f"differ: {data['differs']}"
    over = "" if data.get("within_budget", True) else "  over budget"
    off = f"  {data['deviations']} off the path" if data.get("deviations") else ""
    return f"   {name:30s}{''.join(cells)}  {bits}{over}{off}"


def _batch_row(batch: str, row: Data) -> str:
    if "ratio" not in row:
        return f"   batch {batch:>4s}  {row.get('skipped') or row.get('problem', 'nothing')}"
    return f"   batch {batch:>4s}  plain {row['plain_seconds'] * 1e3:.2f} ms, kept {row['ratio']:.3f} of it"


def _bytes(nbytes: int | None) -> str:
    return "" if nbytes is None else format_bytes(nbytes)


def _number(x: float | None, factor: float, form: str, unit: str = "") -> str:
    return "" if x is None else f"{x * factor:{form}}{unit}"


if __name__ == "__main__":
    sys.exit(main())
