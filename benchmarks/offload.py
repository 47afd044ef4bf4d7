"""Recomputation, offload to a file, and both: extra time at equal budgets, on the CPU.

For the networks of ``beside_checkpoint.py``, at shares of the plain peak: the overhead that the plan foretells and the
extra time that was measured; the measured peak beside the budget and the plan's; R, the saving that was achieved over
the one in theory; and what goes to the file. All variants follow plans of one recorded program. Peaks by the
allocator's account; times interleaved, median of the rounds.

Run: ``python benchmarks/offload.py [--rounds N] [--folder PATH] [--network NAME] [--shares 0.5 0.25]``.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence

from _side_by_side import Step, keep_memory
from beside_checkpoint import Network, medians, networks, peak_of
from torch import nn

import autoremat
from autoremat.engines.torch.world.tiers import TierOf
from autoremat.program import InfeasibleBudget, Link, Plan, Program, simulate

SHARES = (0.5, 0.35, 0.25)
CHOICES = ("recompute", "offload", "both")


def plans_of(program: Program, link: Link, shares: Sequence[float]) -> Iterator[tuple[str, Plan]]:
    """A plan for every share and choice that has one."""
    for share in shares:
        for choice in CHOICES:
            asked = {"link": None if choice == "recompute" else link, "keep": ("*",) if choice == "offload" else ()}
            try:
                yield f"{choice} at {share:.0%}", autoremat.solve(program, share, **asked)  # type: ignore[arg-type]
            except InfeasibleBudget as error:
                print(f"  {choice} at {share:.0%}: none; the floor is {error.floor_bytes / 1e6:.1f} MB")


def step_of(network: Network, plan: Plan, offload: str | None) -> tuple[nn.Module, Step]:
    """A model of its own, and its step under the plan."""
    model = copy.deepcopy(network.model)
    loss = autoremat.checkpoint(network.loss(model), plan=plan, offload=offload)
    return model, lambda: loss(*network.inputs).backward()


def compare(network: Network, folder: str, shares: Sequence[float], rounds: int) -> None:
    """Print one network's table."""
    name = f"disk:{folder}"
    link = TierOf(name, None).link()
    full = autoremat.plan(network.loss(network.model), *network.inputs, budget=1.0, timing="measure")
    program, plain_bytes = full.program, full.plain_peak_bytes
    plain = copy.deepcopy(network.model)
    loss = network.loss(plain)
    steps: dict[str, tuple[nn.Module, Step]] = {"plain": (plain, lambda: loss(*network.inputs).backward())}
    plans = dict(plans_of(program, link, shares))
    for variant, plan in plans.items():
        steps[variant] = step_of(network, plan, None if variant.startswith("recompute") else name)
    peaks = {variant: peak_of(network, *step) for variant, step in steps.items()}
    seconds = medians(steps, rounds) if rounds else {}
    print(f"\n{network.name}: plain peak {peaks['plain'] / 1e6:.1f} MB, step {program.seconds:.2f} s as measured alone")
    print(f"  {folder}: {link.out_bytes_per_second / 1e9:.2f} GB/s out, {link.in_bytes_per_second / 1e9:.2f} GB/s in")
    print("  variant             foretold  measured  peak/budget  peak/plan       R   to the file")
    for variant, plan in plans.items():
        saved = (peaks["plain"] - peaks[variant]) / (plain_bytes - plan.peak_bytes)
        extra = f"{seconds[variant] / seconds['plain'] - 1:+8.1%}" if seconds else "       -"
        sent = simulate(plan.program, plan.schedule).sent_bytes
        print(
            f"  {variant:18s}  {plan.overhead:+8.1%}  {extra}  {peaks[variant] / plan.budget_bytes:11.4f}"
            f"  {peaks[variant] / plan.peak_bytes:9.4f}  {saved:6.3f}  {sent / 1e6:8.1f} MB"
        )


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="0: no times")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--network", choices=("GPT", "ResNet"))
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    asked = parser.parse_args()
    keep_memory()
    for network in networks():
        if asked.network in (None, network.name):
            compare(network, asked.folder, asked.shares, asked.rounds)


if __name__ == "__main__":
    main()
