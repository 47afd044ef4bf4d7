"""``benchmarks/gpu.py --dry-run``: what is going to run on a GPU runs here, and its results have their form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADER = {"format", "version", "dry_run", "date", "device", "torch", "python", "git", "options", "compared", "parts"}
ABOUT_PEAK = {
    "allocated_bytes", "requested_bytes", "reserved_bytes", "resident_bytes", "others_bytes", "own_bytes", "blocks",
    "retries",
}  # fmt: skip
OF_EVERY_VARIANT = {"peak", "rounds", "median_seconds", "ratio", "measured_overhead", "first_step_seconds"}
OF_OURS = {
    "budget_bytes", "predicted_peak_bytes", "above_predicted_bytes", "allocated_above_predicted_bytes", "within_budget",
    "predicted_overhead", "lower_bound", "reruns_per_step", "deviations", "unplanned", "retries", "forward_operators",
}  # fmt: skip
TORCHS = ("plain", "every block")


def dry_run(path: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry-run", "--results", str(path), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "off the path" not in done.stdout
    return json.loads(path.read_text())


def check_network(part: dict[str, Any], budgets: int) -> None:
    variants = part["variants"]
    assert "problem" not in part
    assert part["exactness"]["plain_repeats_itself"]
    ours = {name: v for name, v in variants.items() if name not in TORCHS}
    assert len(ours) == budgets + 1  # and the peak of every block
    for v in variants.values():
        assert v.keys() >= OF_EVERY_VARIANT
        assert v["peak"].keys() == ABOUT_PEAK
    for v in ours.values():
        assert v.keys() >= OF_OURS
        assert v["same_bits"], v["differs"]
        assert v["within_budget"]
        assert v["peak"]["own_bytes"] == v["peak"]["allocated_bytes"] <= v["budget_bytes"]
        assert v["above_predicted_bytes"] <= 0
        assert (v["deviations"], v["unplanned"]) == (0, 0)
    assert variants["plain"]["peak"]["own_bytes"] == variants["plain"]["predicted_peak_bytes"]
    assert ours["budget 1 of 5"]["reruns_per_step"] > 0


def check_host(part: dict[str, Any]) -> None:
    ours = {name: v for name, v in part["variants"].items() if name not in TORCHS}
    assert ours.keys() == {"everything kept", "one byte below the plain peak", "peak of every block"}
    assert ours["everything kept"]["reruns_per_step"] == 0
    assert ours["one byte below the plain peak"]["reruns_per_step"] > 0
    assert all("more_microseconds_per_operator" in v and v["within_budget"] for v in ours.values())


@pytest.mark.slow
@pytest.mark.guard
def test_results_of_a_dry_run(tmp_path: Path) -> None:
    parts = ("gpt2-medium", "host", "unet", "hiding")
    results = dry_run(tmp_path / "gpu.json", "--budgets", "1", "--parts", ",".join(parts))
    assert results.keys() >= HEADER
    assert results["format"] == "autoremat-gpu"
    assert results["dry_run"]
    assert tuple(results["parts"]) == parts
    check_network(results["parts"]["gpt2-medium"], 1)
    check_network(results["parts"]["unet"], 1)
    check_host(results["parts"]["host"])
    batches = results["parts"]["hiding"]["batches"]
    assert all(row["ratio"] > 0 for row in batches.values())
    assert results["parts"]["hiding"]["hidden_from_batch"] in (None, *map(int, batches))


@pytest.mark.slow
def test_a_whole_dry_run(tmp_path: Path) -> None:
    results = dry_run(tmp_path / "gpu.json", "--seconds", "700")
    for name, part in results["parts"].items():
        if name not in ("host", "hiding"):
            check_network(part, 5)


@pytest.mark.slow
@pytest.mark.guard
def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    results = dry_run(tmp_path / "gpu.json", "--seconds", "1", "--parts", "unet")
    assert "s are left of 1" in results["parts"]["unet"]["skipped"]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return importlib.import_module("gpu")


def test_a_part_that_raises_and_one_that_is_stopped(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []

    def breaks(setting: Any, data: dict[str, Any]) -> None:
        data["found"] = 1
        setting.save()
        raise ValueError("of no use")

    driver.run_part(driver.Part("breaks", breaks, 5.0), driver.Setting(None, 0.0), lambda d: saved.append(dict(d)))
    assert saved[0]["found"] == saved[1]["found"] == 1
    assert saved[1]["problem"].startswith("ValueError: of no use [test_gpu_benchmark.py:")
    options = type("Options", (), {"scale": 1.0, "budgets": 1, "dry_run": True})
    monkeypatch.setattr(driver, "START_SECONDS", 0.0)
    stopped = driver.in_process(next(p for p in driver.PARTS if p.name == "unet"), 0.5, options)
    assert "not done after" in stopped["problem"]
    assert driver.has_problem({"parts": {"unet": stopped}})


def test_budgets_and_batches(driver: Any) -> None:
    import _gpu_parts as parts

    assert parts.budgets_between(100, 1100) == [120, 337, 555, 772, 990]
    assert parts.budgets_between(950, 1000) == [951, 963, 975, 987, 999]  # the floor is above 90 %
    assert parts.hidden_from({1: 2.0, 2: 1.01, 4: 1.03, 8: 1.019, 16: 1.0}) == 8
    assert parts.hidden_from({1: 1.0, 2: 1.03}) is None


def test_files_with_tests_for_a_device(driver: Any) -> None:
    files = driver.test_files()
    assert "tests/gpu/test_exact.py" in files
    assert all(driver.MARK in (ROOT / f).read_text() for f in files)
