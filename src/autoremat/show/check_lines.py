"""A check in words: what was compared, and the peaks."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING, Final

from autoremat.program.units import format_bytes

if TYPE_CHECKING:
    from autoremat.checking import Check

_SHOWN: Final = 8


def check_text(check: Check) -> str:
    """Say whether a check is exact and within budget, and what next."""
    return "\n".join([_verdict(check), *_compared(check), *_peaks(check), *_kept(check), *_differing(check)])


def _verdict(check: Check) -> str:
    exact = "bit-identical to plain training" if check.is_exact else "NOT the same as plain training"
    if check.plan is None:
        return f"{exact}; no plan could be made, so the step ran plainly"
    within = "within" if check.is_within_budget else "ABOVE"
    return f"{exact}, {within} the budget of {format_bytes(check.plan.budget_bytes)}"


def _compared(check: Check) -> list[str]:
    lines = []
    for kind, count in check.compared.items():
        wrong = sum(d.name.startswith(kind) for d in check.differences)
        state = "-" if not count else "identical" if not wrong else f"{wrong} of {count} differ"
        lines.append(f"  {kind + 's':12} {count:6}  {state}")
    return lines


def _peaks(check: Check) -> list[str]:
    share = check.peak_bytes / (check.plain_peak_bytes or 1)
    lines = [
        f"  {'plain peak':12} {format_bytes(check.plain_peak_bytes):>10}  measured",
        f"  {'peak':12} {format_bytes(check.peak_bytes):>10}  measured, {share:.0%} of plain",
    ]
    if check.plan is not None:
        lines.append(f"  {'':12} {format_bytes(check.plan.peak_bytes):>10}  predicted")
    if check.deviations:
        lines.append("  the step left its recorded path: its peak is the online policy's, not the plan's")
    return lines


def _kept(check: Check) -> list[str]:
    return [f"  kept from now on: {what}" for what in check.kept]


def _differing(check: Check) -> list[str]:
    lines = []
    for d in check.differences[:_SHOWN]:
        by = "not comparable" if isnan(d.largest) else f"by up to {d.largest:.3g}"
        lines.append(f"  {d.name} differs, {by}")
    more = len(check.differences) - _SHOWN
    if more > 0:
        lines.append(f"  and {more} more")
    if lines:
        lines.append(
            "Run the plain step twice: if it differs from itself, the model is not deterministic (try "
            "torch.use_deterministic_algorithms(True)). If not, this is a bug in autoremat: please report it."
        )
    return lines
