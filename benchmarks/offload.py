"""Recomputation, offload to a file, and both: extra time at equal budgets, on the CPU.

For the networks of ``beside_checkpoint.py``, at shares of the plain peak: the overhead that the plan foretells and the
extra time that was measured; the measured peak beside the budget and the plan's; R, the saving that was achieved over
the one in theory; and what goes to the file. All variants follow plans of one recorded program; where both choices
together have the plan of one alone, that is one variant. Peaks by the allocator's account. Extra time is the median of
the rounds' ratios to the plain step: by the wall clock, and by the processor time of the training's thread with what
it waits for copies, which is what a machine without other work would show.

Run: ``python benchmarks/offload.py [--rounds N] [--folder PATH] [--network NAME] [--shares 0.5 0.25] [--rate 1e8]``.
``--rate`` slows the copies down to so many bytes a second, as on a slow disk without a cache. ``--write`` puts the
table into docs/offload.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _side_by_side import Step, by_clocks, keep_memory
from beside_checkpoint import Network, networks, peak_of
from torch import nn

import autoremat
from autoremat.engines.torch.world import tier
from autoremat.engines.torch.world.tiers import TierOf
from autoremat.planner.wishes import NO_WISHES, Wishes
from autoremat.program import InfeasibleBudget, Link, Plan, Program, simulate

SHARES = (0.5, 0.35, 0.25)
CHOICES = ("recompute", "offload", "both")
os.environ["AUTOREMAT_CACHE"] = "off"
"""Seconds of operators and of copies have to be those of one moment: remembered ones may be of a busier machine."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "offload.md"


def plans_of(program: Program, link: Link, share: float) -> Iterator[tuple[str, Plan]]:
    """A plan for every choice that has one."""
    for choice in CHOICES:
        wishes = Wishes(keep=("*",)) if choice == "offload" else NO_WISHES
        try:
            yield choice, autoremat.solve(program, share, link=None if choice == "recompute" else link, wishes=wishes)
        except InfeasibleBudget as error:
            print(f"{choice} at {share:.0%}: none; the floor is {error.floor_bytes / 1e6:.1f} MB", flush=True)


def step_of(network: Network, plan: Plan, offload: str | None) -> tuple[nn.Module, Step]:
    """A model of its own, and its step under the plan."""
    model = copy.deepcopy(network.model)
    loss = autoremat.checkpoint(network.loss(model), plan=plan, offload=offload)
    return model, lambda: loss(*network.inputs).backward()


class Waiting:
    """Seconds in which the training's thread waits for copies."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._wait = tier.Store.wait
        tier.Store.wait = lambda store, sent: self._timed(store, sent)  # type: ignore[method-assign]

    def _timed(self, store: tier.Store, sent: tier.Copy) -> BaseException | None:
        begin = time.perf_counter()
        try:
            return self._wait(store, sent)
        finally:
            self.seconds += time.perf_counter() - begin


def slow_down(rate: float) -> None:
    """Let every copy take as long as at so many bytes a second."""

    def slowed(copied: Callable[..., None]) -> Callable[..., None]:
        def slow(file: int, memory: Any, offset: int) -> None:
            end = time.perf_counter() + memory.nbytes / rate
            copied(file, memory, offset)
            time.sleep(max(0.0, end - time.perf_counter()))

        return slow

    tier._write, tier._read = slowed(tier._write), slowed(tier._read)


def compare(network: Network, folder: str, shares: Sequence[float], rounds: int) -> Iterator[str]:
    """One network's table."""
    name = f"disk:{folder}"
    link = TierOf(name, None).link()
    full = autoremat.plan(network.loss(network.model), *network.inputs, budget=1.0, timing="measure")
    program, plain_bytes = full.program, full.plain_peak_bytes
    plain = copy.deepcopy(network.model)
    loss = network.loss(plain)
    steps: dict[str, tuple[nn.Module, Step]] = {"plain": (plain, lambda: loss(*network.inputs).backward())}
    plans = {f"{share:.0%}, {choice}": p for share in shares for choice, p in plans_of(program, link, share)}
    same = {v: twin for v, p in plans.items() if (twin := _twin(plans, v, p)) is not None}
    for variant, plan in plans.items():
        if variant not in same:
            steps[variant] = step_of(network, plan, name if plan.schedule.offloads else None)
    peaks = {variant: peak_of(network, *step) for variant, step in steps.items()}
    waiting = Waiting()
    clocks = time.perf_counter, lambda: time.thread_time() + waiting.seconds
    samples = by_clocks(steps, rounds, clocks) if rounds else {}
    yield (
        f"The {network.name}: plain peak {peaks['plain'] / 1e6:.1f} MB; operators alone {program.seconds:.2f} s, plain "
        f"step {_seconds(samples):.2f} s; the link measured as {link.out_bytes_per_second / 1e9:.2f} GB/s out and "
        f"{link.in_bytes_per_second / 1e9:.2f} GB/s in; medians of {rounds} rounds."
    )
    yield ""
    yield "| | foretold | by the wall clock | processor and waiting | peak / budget | peak / plan | R | to the file |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for variant, plan in plans.items():
        run = same.get(variant, variant)
        saved = (peaks["plain"] - peaks[run]) / (plain_bytes - plan.peak_bytes)
        times = [_extra(samples, run, k) for k in range(len(clocks))]
        if run != variant:
            times = [f"as {run.split(', ')[1]}"] * 2
        sent = simulate(plan.program, plan.schedule).sent_bytes
        to_file = f"{sent / 1e6:.0f} MB" if sent else ""
        yield (
            f"| {variant} | {plan.overhead:+.1%} | {times[0]} | {times[1]} | {peaks[run] / plan.budget_bytes:.3f} | "
            f"{peaks[run] / plan.peak_bytes:.4f} | {saved:.3f} | {to_file} |"
        )


def _twin(plans: dict[str, Plan], variant: str, plan: Plan) -> str | None:
    """A variant ahead that has the same schedule."""
    ahead = list(plans)[: list(plans).index(variant)]
    return next((v for v in ahead if plans[v].schedule == plan.schedule), None)


def _seconds(samples: dict[str, list[tuple[float, ...]]]) -> float:
    return statistics.median(wall for wall, *_ in samples["plain"]) if samples else 0.0


def _extra(samples: dict[str, list[tuple[float, ...]]], variant: str, clock: int) -> str:
    """The median extra time, round by round."""
    if not samples:
        return ""
    pairs = zip(samples[variant], samples["plain"], strict=True)
    return f"{statistics.median(s[clock] / plain[clock] for s, plain in pairs) - 1:+.1%}"


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="0: no times")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--network", choices=("GPT", "ResNet"))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--rate", type=float, help="bytes a second, to which copies are slowed down")
    parser.add_argument("--write", action="store_true", help="put the table into docs/offload.md")
    asked = parser.parse_args()
    keep_memory()
    if asked.rate:
        slow_down(asked.rate)
    for network in networks():
        if asked.network in (None, network.name):
            text = "\n".join(compare(network, asked.folder, asked.shares, asked.rounds))
            print(text + "\n", flush=True)
            if asked.write:
                _write(text, f"{network.name}, slow link" if asked.rate else network.name)


def _write(text: str, name: str) -> None:
    """Put a table between its marks."""
    begin, end = f"<!-- benchmarks/offload.py: {name} -->", "<!-- end of offload.py -->"
    page = PAGE.read_text()
    at = page.index(begin) + len(begin)
    PAGE.write_text(page[:at] + f"\n\n{text}\n\n" + page[page.index(end, at) :])


if __name__ == "__main__":
    main()
