"""What an input loses under the plan of a larger one."""

from __future__ import annotations

import math
from typing import Final

from autoremat.engines.torch.eager.script import Script
from autoremat.program import Plan

_RERUN_SECONDS: Final = 5e-5
"""Rough time of Python for a rerun, besides its operators."""


def lost_seconds(plan: Plan | None, script: Script | None, share: float) -> float:
    """Estimate what an input of this share of the size loses.

    It would lose less under its own plan. All but what is always there grows with the input; so does time.
    """
    if plan is None or plan.overhead <= 0:
        return 0.0
    fixed = plan.program.fixed_bytes
    above = max(1, plan.plain_peak_bytes - plan.budget_bytes)
    own = max(0.0, fixed + share * (plan.plain_peak_bytes - fixed) - plan.budget_bytes)
    seconds = plan.overhead * plan.program.seconds * share
    if script is not None:
        seconds += _RERUN_SECONDS * script.n_reruns
    return seconds * max(0.0, 1 - own / above)


def shares_of_interest(plan: Plan | None) -> tuple[float, ...]:
    """Find shares of the input's size worth plans of their own.

    About at the first one nothing need be rerun any more; the second one is half-way. None where nothing is rerun.
    """
    if plan is None or plan.overhead <= 0:
        return ()
    fixed = plan.program.fixed_bytes
    share = (plan.budget_bytes - fixed) / max(1, plan.plain_peak_bytes - fixed)
    return (share, math.sqrt(share)) if 0 < share < 1 else ()
