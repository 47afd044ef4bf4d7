"""Two processes, one account: the first one plans, the second one trains within the floor of that plan.

For each network two new processes. The first one plans (``autoremat.plan``) and names the floor. The second one is
given that floor as its budget (``autoremat.checkpoint``), and one byte less, which it must refuse and name the same
floor.
With what the first one has measured kept between them (``AUTOREMAT_CACHE``, a new folder for every network), the second
one has nothing to measure. ``--apart``: nothing is kept, and both measure.

Columns: operators that were run to be measured, processor seconds of that, of the whole plan or first step (forward,
recording, measuring, planning), share of the step's seconds that was timed; the budget, and whether it was accepted.

Run: ``PYTHONPATH=. python benchmarks/second_process.py``; ``--zoo 10`` adds as many real architectures, of the
libraries that are there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo_models import ZOO, tell_torchvision_of_its_operators

import autoremat
from autoremat.engines.torch.operators import timing
from tests.zoo import CASES

Step = Callable[[], torch.Tensor]


@dataclass
class Seen:
    """What one process has seen.

    Attributes:
        floor_bytes: the floor that it names.
        measured: operators that it has run to measure them.
        measuring_seconds: processor time of that.
        seconds: processor time of all.
        share: of the step's seconds, what was timed.
        accepted: the budget.
        refused: one byte less, and named the same floor.
    """

    floor_bytes: int
    measured: int
    measuring_seconds: float
    seconds: float
    share: float
    accepted: bool = True
    refused: bool = True


class Meter:
    """Counts what is run to be measured."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._run = timing._measure_for_real
        timing._measure_for_real = self._counted

    def _counted(self, *args: Any, **options: Any) -> Any:
        begin = time.process_time()
        try:
            return self._run(*args, **options)
        finally:
            self.count += 1
            self.seconds += time.process_time() - begin


def step_of(name: str) -> tuple[Step, nn.Module]:
    """The network of this name, and its loss with its inputs."""
    torch.manual_seed(0)
    if case := next((c for c in CASES if c.name == name), None):
        network, inputs = case.model(), case.inputs()
        loss = case.loss(network)
        return lambda: loss(*inputs), network
    tell_torchvision_of_its_operators()
    specimen = next(s for s in ZOO if s.name == name)
    model, given = specimen.model().train(), specimen.inputs()
    return lambda: specimen.loss(model(**given)), model


def planned(step: Step) -> Seen:
    """Plan, and name the floor."""
    meter, begin = Meter(), time.process_time()
    plan = autoremat.plan(step, budget="100%", time_limit_seconds=1.0)
    seconds = time.process_time() - begin
    floor = autoremat.plan(step, budget=plan.floor_bytes, time_limit_seconds=1.0).floor_bytes
    return Seen(floor, meter.count, meter.seconds, seconds, plan.program.measured_share)


def trained(step: Step, model: nn.Module, budget: int) -> Seen:
    """Take a first step within the budget; then try with one byte less."""
    meter, begin = Meter(), time.process_time()
    call = autoremat.checkpoint(step, budget=budget)
    try:
        call().backward()
    except autoremat.InfeasibleBudget as error:
        return Seen(error.floor_bytes, meter.count, meter.seconds, time.process_time() - begin, 0.0, accepted=False)
    seconds, plan = time.process_time() - begin, autoremat.stats(call).plan
    assert plan is not None
    seen = Seen(plan.floor_bytes, meter.count, meter.seconds, seconds, plan.program.measured_share)
    model.zero_grad()
    try:
        autoremat.checkpoint(step, budget=budget - 1)().backward()
        seen.refused = False
    except autoremat.InfeasibleBudget as error:
        seen.refused = error.floor_bytes == budget
    return seen


def in_a_process(name: str, cache: str, budget: int | None = None) -> Seen:
    """Either of these, in a new process."""
    command = [sys.executable, __file__, "--one", name, *(() if budget is None else ("--budget", str(budget)))]
    done = subprocess.run(
        command, env=os.environ | {"AUTOREMAT_CACHE": cache}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Seen(**json.loads(done.stdout.splitlines()[-1]))


def of_the_zoo(n: int) -> list[str]:
    """Names of so many architectures of installed libraries."""
    found = [s.name for s in ZOO if importlib.util.find_spec(s.library.split(".")[0].replace("-", "_")) is not None]
    return found[:: max(1, len(found) // n)][:n] if n else []


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=int, default=0, help="so many real architectures beside the seven networks")
    parser.add_argument("--apart", action="store_true", help="nothing is kept: both processes measure")
    parser.add_argument("--only", help="one network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        warnings.simplefilter("ignore")
        step, model = step_of(options.one)
        seen = planned(step) if options.budget is None else trained(step, model, options.budget)
        print(json.dumps(asdict(seen)))
        return
    print("| network | plan: operators | measuring s | all s | timed | step: operators | measuring s | all s | timed "
          "| floor, bytes | accepted | less refused |")  # fmt: skip
    print("|" + " --- |" * 12)
    accepted = refused = total = 0
    for name in [options.only] if options.only else [*map(str, CASES), *of_the_zoo(options.zoo)]:
        with tempfile.TemporaryDirectory() as folder:
            cache = "off" if options.apart else str(Path(folder) / "cache")
            first = in_a_process(name, cache)
            second = in_a_process(name, cache, first.floor_bytes)
        cells = [f"{s.measured} | {s.measuring_seconds:.2f} | {s.seconds:.2f} | {s.share:.0%}" for s in (first, second)]
        print(f"| {name} | {' | '.join(cells)} | {first.floor_bytes:,} | {second.accepted} | {second.refused} |",
              flush=True)  # fmt: skip
        total, accepted, refused = total + 1, accepted + second.accepted, refused + second.refused
    print(f"{accepted} of {total} floors accepted, one byte less refused in {refused}")


if __name__ == "__main__":
    main()
